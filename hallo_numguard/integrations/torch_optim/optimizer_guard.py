"""The guard of one optimizer: what is looked at before its step, and what becomes of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.guard import named_tensors as attribution
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import Model
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.session import Held, Session
from hallo_numguard.integrations.torch_optim.grad_scaler import scaling_of
from hallo_numguard.integrations.torch_optim.model_hooks import (
    Calls,
    Named,
    Shown,
    distributed,
    inner,
    loss_in,
    named_parameters,
    refuse_flat_shards,
)
from hallo_numguard.integrations.torch_optim.parameter_gradients import Gradients, Looked
from hallo_numguard.ops.device import Sent

T = TypeVar("T")

UNSCALED = LossScaling(1.0, dynamic=False)


class Look(NamedTuple):
    """What a pass over the gradients has shown, the same on every rank that shares them.

    Attributes:
        gradients: What this rank holds of them.
        bad: Whether any is not finite, on any rank.
        norm: Of all together, as they are; of no meaning if one is not finite.
        scale: The loss scale that was given; 1 if none was.
    """

    gradients: list[torch.Tensor]
    bad: bool
    norm: float
    scale: float


class OptimizerGuard:
    """Looks at the gradients that an optimizer is about to apply, and says what is wrong with them.

    A step is `look`, and then `skip`, or the optimizer's own step and `done`. Ranks that share gradients, which they
    do under DistributedDataParallel and with DTensors, all do the same; others each look after themselves.

    Args:
        optimizer: A plain one.
        named: The model, or its named parameters.
        config: What to do.
        on_overflow: See `attach`.
        calls: Shows the calls of the model, made as `Calls` is.

    Attributes:
        session: Reports, history and findings.
        active: Whether it guards still.
        went_back: Whether the last step that was skipped was undone with those since a checkpoint.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Named,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        calls: Callable[..., Shown] = Calls,
    ) -> None:
        parameters = named_parameters(named, optimizer)
        self._model = named if isinstance(named, nn.Module) else None
        self._gradients = Gradients(optimizer, parameters)
        self._calls: Shown | None = None
        if self._model is not None:
            refuse_flat_shards(self._model)
            self._calls = calls(self._model, self._saw_call, self._saw_output)
        if self._gradients.sharded:  # these are reduced before any hook would see them
            config = replace(config, local_gradients="never")
        self._keeper = config.keeper
        self._device = parameters[0].tensor.device
        self._ranks = self._find_ranks()
        self.session = Session(self._described(parameters), self._ranks, config, on_overflow)
        self._loss_is_told = False
        self._steps = 0
        self._under_way = False
        self._held: tuple[Sent, Held] | None = None
        self.went_back = False
        self.active = True
        self.session.inspect_weights("the optimizer was guarded")

    def _find_ranks(self) -> Ranks:
        if self._gradients.sharded:
            return Ranks()
        reducer = None if self._model is None else distributed(self._model)
        return Ranks(alone=True) if reducer is None else Ranks(reducer.process_group)

    def _described(self, parameters: list[NamedTensor]) -> Model:
        sharded = self._gradients.sharded
        module = None if self._model is None else inner(self._model)
        return Model(
            parameters,
            [] if module is None else attribution.named_buffers(module),
            sliced_gradients=sharded,
            scan_state=self._gradients.scan_state,
            sliced_state=sharded,
            device=self._device,
            module=module,
            forward=None if self._calls is None else self._calls.again,
            backward_again=not sharded,
            can_go_back=self._can_go_back,
        )

    def trained(self) -> list[tuple[str, torch.Tensor]]:
        """Returns the optimizer's parameters and their names."""
        return self._gradients.trained()

    def knows_all(self) -> bool:
        """Returns whether all that the optimizer trains has a name."""
        return self._gradients.know_all()

    def _can_go_back(self) -> bool:
        """Whether the script has saved its run; rank 0 alone writes what has state dicts, of slices too few."""
        return self._keeper.run is not None and not self._gradients.sharded

    def take_off(self) -> None:
        """Guards no longer. Reports and history stay readable."""
        self.active = False
        if self._calls is not None:
            self._calls.stop()
        self.session.stop()

    @property
    def sharded(self) -> bool:
        """Whether the parameters are DTensors."""
        return self._gradients.sharded

    # -- what the model shows ------------------------------------------------------------------------------------------

    def _saw_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._guarded(lambda: self._note_call(args, kwargs))

    def _note_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._ranks.size == 1:  # the model that was given may be inside of one that reduces
            reducer = DistributedDataParallel._get_active_ddp_module()
            if reducer is not None and self._model is not None and inner(reducer) is inner(self._model):
                self._ranks.join(reducer.process_group)
        self.session.saw_call(args, kwargs)

    def _saw_output(self, output: Any) -> None:
        self._guarded(lambda: self._note_output(output))

    def _note_output(self, output: Any) -> None:
        self.session.saw_output(output)
        loss = None if self._loss_is_told else loss_in(output)
        if loss is not None:
            self.session.saw_loss(loss)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Takes note of a micro-batch's loss, before its backward: in place of what the model's output tells of it."""
        if not self._loss_is_told:
            self._loss_is_told = True
            self.session.forget_losses()
        self._guarded(lambda: self.session.saw_loss(loss))

    def saw_result(self, loss: Any) -> None:
        """Takes note of what a closure returned: if it is a loss, no other counts."""
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.session.forget_losses()
            self._guarded(lambda: self.session.saw_loss(loss))

    def state_was_loaded(self) -> None:
        """Looks at weights and optimizer state that came from elsewhere."""
        self._guarded(lambda: self.session.inspect_weights("the optimizer's state was loaded"))

    # -- a step --------------------------------------------------------------------------------------------------------

    def look(self, scale: torch.Tensor | None = None, are_scaled: bool = True) -> Look:
        """Reads the gradients and waits for the result: the one synchronisation of a step.

        Args:
            scale: The loss scale of a GradScaler, on any device; it is read with the rest. None if there is none.
            are_scaled: Whether the gradients are still scaled like the loss.

        Raises:
            InvalidInput: If a gradient is sparse.
        """
        gradients = self._gradients.collect()
        looked = self._guarded(lambda: self._gradients.read(gradients))
        totals = self._totals(gradients, looked)
        if self._gradients.sharded:
            totals = self._agree(totals)
        if scale is not None:
            totals = torch.cat([totals, scale.to(totals).reshape(1)])
        bad, squares, *scales = totals.tolist()
        self._begin(looked, scaling_of(scales[0]) if scales else UNSCALED, are_scaled)
        return Look(gradients, bad > 0, math.sqrt(squares), scales[0] if scales else 1.0)

    def look_without_waiting(self) -> torch.Tensor:
        """Reads the gradients, which are not DTensors, and leaves it to the optimizer to apply them if they are finite.

        When the step before is over, which is to be `settle`d first, and the optimizer has made its own: `hold`.

        Returns:
            float64 [2] on the device: how many of them are not finite, and the sum of the squares of all.
        """
        gradients = self._gradients.collect()
        looked = self._guarded(lambda: self._gradients.read(gradients))
        self._begin(looked, UNSCALED)
        return self._totals(gradients, looked)

    def _totals(self, gradients: list[torch.Tensor], looked: Looked | None) -> torch.Tensor:
        totals = _totals_without_us(gradients) if looked is None else looked.totals()
        return totals.to(self._device)  # a rank that holds nothing has them on the CPU

    def _begin(self, looked: Looked | None, scaling: LossScaling, are_scaled: bool = True) -> None:
        self._steps += 1
        if looked is None:
            return
        scanned = looked.scanned
        if not are_scaled:
            scanned = replace(scanned, packed=_scaled(scanned.packed, scaling.scale))
        self._under_way = True
        self._guarded(lambda: self.session.before_step(self._steps, scaling, scanned))

    def _agree(self, totals: torch.Tensor) -> torch.Tensor:
        """Adds up what the ranks hold; if the guard of one has failed, all take theirs off. Every rank is here."""
        failed = totals.new_tensor([float(self.session.failed)])
        *_, failures = summed = self._ranks.sum(torch.cat([totals, failed]))
        if failures:
            self.session.failed = True
            self.take_off()
        return summed[:2]

    def skip(self) -> None:
        """Finds out why the gradients are bad, and goes back to a checkpoint if that is to be done.

        The optimizer must not make its step. All ranks come here.

        Raises:
            NumericsError: If that is what the policy says. Whatever `on_overflow` raises.
        """
        self.went_back = False
        if not self.active:
            return
        error = self.session.overflow()
        self._take_off_if_failed(everywhere=True)
        self.done(applied=False)
        if error is not None:
            raise error
        if self.session.goes_back:
            self._go_back()

    def _go_back(self) -> None:
        """Loads what the script has saved, in whatever order; it is looked at when all of it is there."""
        self.active = False
        try:
            self.session.go_back(self._keeper.run)
        finally:
            self.active = True
        self.went_back = True
        self._guarded(lambda: self.session.inspect_weights("loaded from a checkpoint"))

    def hold(self, totals: torch.Tensor) -> None:
        """Keeps the step for `settle`, with its batch, and goes on to the next. Nobody waits for `totals`."""
        self._held = Sent(totals), self.session.exchange(Held())

    def settle(self) -> None:
        """Completes the step that is held, if any: like `skip` if it was bad. All ranks come here in the same step.

        By now, a step later, the optimizer has not applied what is not finite, so the weights are what they were. If
        the run went back to a checkpoint, the present gradients are of no use any more.
        """
        self.went_back = False
        if self._held is None:
            return
        (totals, held), self._held = self._held, None
        now = self.session.exchange(held)
        try:
            if totals.read()[0] > 0:
                self.skip()
            else:
                self.done(applied=True)
        finally:
            self.session.exchange(Held() if self.went_back else now)

    def done(self, applied: bool) -> None:
        """The step that was looked at last is over."""
        if self._under_way:
            self._under_way = False
            self._guarded(lambda: self.session.after_step(applied))

    # -- its own failures ----------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T]) -> T | None:
        if not self.active:
            return None
        result = self.session.guarded(work)
        # Others may find an overflow, and would wait for this rank: until then it looks as torch would.
        self._take_off_if_failed(everywhere=self._ranks.size == 1)
        return result

    def _take_off_if_failed(self, everywhere: bool) -> None:
        if self.session.failed and everywhere:
            self.take_off()


def _scaled(packed: torch.Tensor, scale: float) -> torch.Tensor:
    """The records of gradients as they would be if nobody had unscaled them."""
    packed = packed.clone()
    floats = packed.view(torch.float64)
    floats[:, 6] *= scale
    floats[:, 7] *= scale * scale
    return packed


def _totals_without_us(gradients: list[torch.Tensor]) -> torch.Tensor:
    """What `Looked.totals` gives, by torch alone."""
    if not gradients:
        return torch.zeros(2, dtype=torch.float64)
    norms = torch.stack([torch.linalg.vector_norm(gradient.double()) for gradient in gradients])
    return torch.stack([(~norms.isfinite()).sum(dtype=torch.float64), norms.square().sum()])
