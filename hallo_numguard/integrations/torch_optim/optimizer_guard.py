"""The guard of one optimizer: the check before its step, and the outcome of the step."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.feeding_modules import Also, named_modules
from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor, named_buffers
from hallo_numguard.guard.optimizer_view import view_of
from hallo_numguard.guard.readable import UncheckedTensors, norm_by_torch
from hallo_numguard.guard.session import Session
from hallo_numguard.guard.step.figure_exchange import PART
from hallo_numguard.guard.step.pending import PendingStep
from hallo_numguard.integrations.backward_calls import LossObserver
from hallo_numguard.integrations.patches import replaced
from hallo_numguard.integrations.torch_optim.grad_scaler import scale_of, scaling_of
from hallo_numguard.integrations.torch_optim.model_hooks import (
    CallObserver,
    Named,
    Observer,
    distributed,
    inner,
    is_compiled,
    loss_in,
    named_parameters,
    refuse_flat_shards,
    reshard,
)
from hallo_numguard.integrations.torch_optim.parameter_gradients import (
    Gradients,
    GradientScan,
    steps_seen,
    totals_of,
)
from hallo_numguard.integrations.torch_optim.unmade_steps import UnmadeSteps
from hallo_numguard.ops.device import AsyncHostCopy


class GradientCheck(NamedTuple):
    """Result of a pass over the gradients, the same on all ranks that share them.

    Attributes:
        gradients: Gradients that this rank holds.
        bad: Whether any is not finite, on any rank.
        norm: L2 norm of all gradients, not unscaled; meaningless if one is not finite.
        scale: Loss scale; 1 without a scaler.
    """

    gradients: list[torch.Tensor]
    bad: bool
    norm: float
    scale: float


class OptimizerGuard:
    """Checks the gradients that an optimizer is about to apply, and explains bad ones.

    A step is `check`, and then either `skip`, or the optimizer's own step and `done`. Ranks that share gradients (under
    DistributedDataParallel and with DTensors) all do the same; others are each guarded alone.

    Args:
        optimizer: A plain optimizer.
        named: The model, or its named parameters.
        config: Settings.
        on_overflow: Called with each `OverflowReport`.
        observer: Observes the calls of the model, constructed as `CallObserver` is.
        step_number: Returns the framework's number of the step under way. Default: steps are counted from the number
            of those that the optimizer's state has seen.
        framework: Name of the framework, for reports.
        also: Modules that feed the model; see `hallo_numguard.attach`.

    Attributes:
        session: Reports, history and findings.
        active: Whether the guard is still on.
        device: Device of the first parameter that the optimizer trains.
        went_back: Whether the last skipped step ended in a rollback to a checkpoint.
        looks_before_clipping: Whether the gradients are read before torch clips them, and not after it.
        scaler: The GradScaler of the steps; None if none is known.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Named,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        observer: Callable[..., Observer] = CallObserver,
        step_number: Callable[[], int] | None = None,
        framework: str = "PyTorch",
        also: Also = (),
    ) -> None:
        self._also = named_modules(also)
        self._framework = framework
        self._optimizer = optimizer
        self._step_number = step_number
        self._named = named if isinstance(named, nn.Module) else list(named)
        self._parameters = parameters = named_parameters(self._named, optimizer)
        self._model = named if isinstance(named, nn.Module) else None
        if self._model is not None:
            refuse_flat_shards(self._model)
        self._unchecked = UncheckedTensors()
        self._gradients = Gradients(optimizer, parameters, self._unchecked)
        self._calls: Observer | None = None
        self._reducer: Callable[[], Any] = lambda: None  # a DistributedDataParallel around the model
        if self._gradients.sharded:  # these are reduced before any hook would see them
            config = replace(config, local_gradients="never")
        self._keeper = config.keeper
        self.device = next(self._gradients.own_parameters()).device
        self._ranks = self._find_ranks()
        self._steps = 0  # since the guard is on, whatever the optimizer's state says
        self._steps_before = 0
        self._loaded = optimizer.register_load_state_dict_post_hook(_counting_hook(self))
        self._under_way = False
        self._is_bad = False  # the check under way
        self._put_aside: tuple[AsyncHostCopy, PendingStep] | None = None
        self.went_back = False
        self.looks_before_clipping = True
        self.scaler: Any = None
        self._late: Exception | None = None
        self.active = True
        with contextlib.ExitStack() as undo:
            undo.callback(self._loaded.remove)
            if self._model is not None:
                self._calls = observer(self._model, self._on_forward_start, self._on_forward_end)
                undo.callback(self._calls.stop)
            self.session = Session(self._described(parameters), self._ranks, config, on_overflow)
            undo.callback(self.session.stop)
            self._unmade = self._watch_for_unmade_steps()
            undo.callback(self._unmade.stop)
            self._losses = LossObserver(self.session, self._gradients.own_parameters, self._unmade.before_backward)
            undo.callback(self._losses.stop)
            self.session.inspect_weights("the optimizer was guarded")
            self.count_from_state()
            undo.pop_all()

    def _find_ranks(self) -> Ranks:
        if self._gradients.sharded:
            return Ranks()
        reducer = None if self._model is None else distributed(self._model)
        return Ranks(alone=True) if reducer is None else Ranks(reducer.process_group)

    def _described(self, parameters: list[NamedTensor]) -> GuardedModel:
        sharded = self._gradients.sharded
        module = None if self._model is None else inner(self._model)
        return GuardedModel(
            parameters,
            [] if module is None else named_buffers(module),
            sliced_gradients=sharded,
            scan_state=self._gradients.scan_state,
            sliced_state=sharded,
            device=self.device,
            module=module,
            forward=None if self._calls is None else self._calls.forward,
            forward_compiled=None if self._calls is None else self._calls.forward_compiled,
            gathers_parameters=sharded,
            can_go_back=self._can_go_back,
            called_directly=self._called_directly,
            is_compiled=lambda: self._model is not None and is_compiled(self._model),
            unchecked=self._unchecked,
            optimizer=view_of(self._optimizer),
            also=self._also,
            run_facts={"framework": self._framework},
        )

    @contextlib.contextmanager
    def _called_directly(self) -> Iterator[None]:
        """Context in which DistributedDataParallel does not wait for a backward pass that reduces."""
        reducer = self._reducer()
        if reducer is None and self._model is not None:
            reducer = distributed(self._model)
        with contextlib.nullcontext() if reducer is None else replaced(reducer, "forward", reducer.module):
            yield
        if self._model is not None:
            reshard(self._model)

    def trained(self) -> list[tuple[str, torch.Tensor]]:
        """Returns the optimizer's parameters and their names."""
        return self._gradients.trained()

    def add_new_parameters(self) -> None:
        """Guards the parameters that the optimizer trains since its groups have changed. Between two steps."""
        if self.active and not self._gradients.all_named():
            self.session.probes.run("addition of parameters", self._add_new_parameters)

    def _add_new_parameters(self) -> None:
        known = {item.tensor for item in self._parameters}
        new = [item for item in named_parameters(self._named, self._optimizer) if item.tensor not in known]
        self.session.add_parameters(new)  # which has this guard's list
        self._gradients.parameters_were_added()

    def _can_go_back(self) -> bool:
        """Whether the script has saved its run. State dicts are written by rank 0 alone, so slices would be lost."""
        return self._keeper.run is not None and not self._gradients.sharded

    def take_off(self) -> None:
        """Removes the guard. Reports and history stay readable."""
        self.active = False
        self._loaded.remove()
        if self._calls is not None:
            self._calls.stop()
        self._losses.stop()
        self._unmade.stop()
        self.session.stop()

    @property
    def sharded(self) -> bool:
        """Whether the parameters are DTensors."""
        return self._gradients.sharded

    # -- observation of the model -------------------------------------------------------------------------------------

    def _on_forward_start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._no_step_was_made()
        self.session.probes.run("search for the process group", self._look_at_reducer)
        self.session.on_forward_start(args, kwargs)

    def _look_at_reducer(self) -> None:
        """Finds out whether the model is inside of a DistributedDataParallel, and whether it will reduce."""
        reducer: Any = DistributedDataParallel._get_active_ddp_module()
        if reducer is None or self._model is None or inner(reducer) is not inner(self._model):
            return
        self._reducer = weakref.ref(reducer)
        if self._ranks.size == 1:
            self._ranks.join(reducer.process_group)
        self.session.judge_alone(_why_alone(reducer))

    def _on_forward_end(self, output: Any) -> None:
        self.session.on_forward_end(output)
        self.session.probes.run("record of the loss", self._find_loss, output)

    def _find_loss(self, output: Any) -> None:
        loss = loss_in(output)
        if loss is not None:
            self._losses.find(loss)

    def on_loss(self, loss: torch.Tensor, is_certain: bool = False) -> None:
        """Records a micro-batch's loss, before it is scaled and its backward pass is made.

        Args:
            loss: The loss.
            is_certain: Whether it is this guard's, and not that of another optimizer.
        """
        if self.active:
            self._losses.show(loss, is_certain)

    def gradients_were_cleared(self) -> None:
        """Forgets the losses of the gradients that are no more."""
        if not self.active:
            return
        self._no_step_was_made()
        self._unmade.gradients_were_cleared()
        self.session.forget_losses()
        self._raise_late()

    def on_closure_result(self, loss: Any) -> None:
        """Records the result of a closure: if it is a loss, no other counts."""
        if self.active and isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.session.forget_losses()
            self._losses.forget()
            self.session.on_loss(loss, of_backward=True)

    def count_from_state(self) -> None:
        """Goes on from the number of steps that the optimizer's state has seen, if it says so."""
        seen = self.session.probes.run("number of the step", steps_seen, self._optimizer)
        if seen is not None:
            self._steps_before = seen - self._steps

    def _number(self) -> int:
        """The number of the step that has just begun."""
        return self._steps_before + self._steps if self._step_number is None else self._step_number()

    def state_was_loaded(self) -> None:
        """Scans weights and optimizer state that were loaded."""
        if self.active:
            self.session.inspect_weights("the optimizer's state was loaded")

    # -- a step --------------------------------------------------------------------------------------------------------

    def check(self, scale: torch.Tensor | None = None, are_scaled: bool = True) -> GradientCheck:
        """Reads the gradients and waits for the result: the one host sync of a step.

        Args:
            scale: Loss scale of a GradScaler, on any device, to be read with the rest. None if there is none.
            are_scaled: Whether the gradients are still scaled like the loss.
        """
        gradients = self._collect()
        scan = self._scan(gradients)
        totals = self._totals(gradients, scan)
        whole = None if scan is None or not scan.unread else scan.figures()
        if self._gradients.sharded:
            totals, whole = self._of_all_ranks(totals, scan)
        if scale is not None:
            totals = torch.cat([totals, scale.to(totals).reshape(1)])
        bad, squares, *scales = totals.tolist()
        self._begin(scan, scaling_of(scales[0]) if scales else UNSCALED, are_scaled, whole)
        self._is_bad = bad > 0
        return GradientCheck(gradients, self._is_bad, math.sqrt(squares), scales[0] if scales else 1.0)

    def check_without_sync(self) -> torch.Tensor:
        """Reads the gradients, which are no DTensors, and leaves it to the optimizer to apply them if they are finite.

        `resolve_pending_step` is called before it, `postpone` after the optimizer's own step.

        Returns:
            Number of gradients that are not finite, and the sum of the squares of all. float64 [2] on the device.
        """
        gradients = self._collect()
        scan = self._scan(gradients)
        self._begin(scan, UNSCALED)
        return self._totals(gradients, scan)

    def _collect(self) -> list[torch.Tensor]:
        gradients = self.session.essential("search for the gradients", self._gradients.collect)
        if gradients is not None and self._gradients.has_unknown:
            self.add_new_parameters()
            gradients = self.session.essential("search for the gradients", self._gradients.collect)
        if gradients is not None:
            return gradients
        found = [] if self.sharded else [parameter.grad for parameter in self._gradients.own_parameters()]
        return [gradient for gradient in found if gradient is not None]

    def divide(self, gradients: list[torch.Tensor], divisor: float) -> None:
        """Divides the gradients of the last check."""
        if divisor != 1.0:
            # The reciprocal in float32, as GradScaler has it: the same bits.
            self._gradients.multiply(gradients, float(torch.tensor(1.0 / divisor, dtype=torch.float32)))

    def _scan(self, gradients: list[torch.Tensor]) -> GradientScan | None:
        if not self.active:
            return None
        self._raise_late()
        early = self.session.probes.run("look before clipping", self._unmade.scan_of, gradients)
        return early or self._read(gradients)

    def _read(self, gradients: list[torch.Tensor]) -> GradientScan | None:
        return self.session.essential("scan of the gradients", self._gradients.read, gradients)

    def _totals(self, gradients: list[torch.Tensor], scan: GradientScan | None) -> torch.Tensor:
        totals = _totals_by_torch(gradients) if scan is None else scan.totals()
        return totals.to(self.device)  # a rank that holds nothing has them on the CPU

    def _of_all_ranks(
        self, totals: torch.Tensor, scan: GradientScan | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds up the totals of all ranks, and the figures for the flight recorder, in one reduction."""
        figures = torch.zeros(len(PART), dtype=torch.float64) if scan is None else scan.figures()
        nan, inf, absmax, _ = figures.to(self.device).unbind()
        of_ranks = torch.zeros(self._ranks.size, dtype=torch.float64, device=self.device)
        of_ranks[self._ranks.position] = absmax
        both = self._ranks.sum(torch.cat([totals, torch.stack([nan, inf]), of_ranks]))
        return both[:2], torch.stack([both[2], both[3], both[4:].amax(), both[1]])

    def _begin(
        self,
        scan: GradientScan | None,
        scaling: LossScaling,
        are_scaled: bool = True,
        whole: torch.Tensor | None = None,
    ) -> None:
        self._steps += 1
        if not self.active:
            return
        self._under_way = True
        self.session.probes.run("record of the loss", self._losses.begin_step)
        if scan is None:  # torch alone has checked
            self.session.begin_unscanned(self._number(), scaling)
            return
        pieces = scan.pieces
        if not are_scaled:  # all figures of a run are of scaled gradients
            pieces = replace(pieces, table=pieces.table.scaled(scaling.scale))
            if whole is not None:
                whole = whole * torch.tensor([1.0, 1.0, scaling.scale, scaling.scale**2]).to(whole)
        self.session.before_step(self._number(), scaling, pieces, whole)

    def skip(self) -> None:
        """Explains the bad gradients, and goes back to a checkpoint if the policy says so.

        The optimizer must not make its step. All ranks come here.

        Raises:
            NumericsError: If the policy says so. Also any exception of `on_overflow`.
        """
        self.went_back = False
        if not self.active:
            return
        error = self.session.overflow(self._steps)
        self.session.probes.run("look before clipping", self._remember_bad_gradients)
        self.done(applied=False)
        if error is not None:
            raise error
        if self.session.goes_back:
            self._go_back()

    # -- steps that the script leaves out ------------------------------------------------------------------------------

    def _watch_for_unmade_steps(self) -> UnmadeSteps:
        return UnmadeSteps(
            self._collect,
            self._read,
            lambda: self.active and self.looks_before_clipping and not self._under_way and not self.sharded,
            self._on_unmade_step,
            self._on_uncleared,
            self._raise_late,
            self.session.probes,
        )

    def _remember_bad_gradients(self) -> None:
        if not self.sharded:
            self._unmade.step_was_bad(self._collect())

    def _on_unmade_step(self, scan: GradientScan) -> None:
        """Explains a step that the script has left out. What the policy raises is raised later, at a call of ours."""
        scaling = UNSCALED if self.scaler is None else scaling_of(float(scale_of(self.scaler)))
        self._begin(scan, scaling, are_scaled=False)
        self._leave_step_out()

    def _no_step_was_made(self) -> None:
        """The gradients are about to be cleared, or added to: explains a step that was left out after a bad check."""
        if self._under_way and self._is_bad and not self.sharded:
            self.session.probes.run("look before clipping", self._leave_step_out)
        self._unmade.no_step_was_made()

    def _leave_step_out(self) -> None:
        if self._unmade.is_uncleared:
            self._remember_bad_gradients()
            self.done(applied=False)
            return
        try:
            self.skip()
        except Exception as error:  # noqa: BLE001 - of the policy, or the user's own
            self._late = error

    def _on_uncleared(self) -> None:
        self._late = self.session.on_uncleared_gradients(self._steps + 1) or self._late

    def _raise_late(self) -> None:
        error, self._late = self._late, None
        if error is not None:
            raise error

    def _go_back(self) -> None:
        """Loads the script's saved parts, in whatever order, and scans them when all are there."""
        self.active = False
        try:
            self.session.go_back(self._keeper.run)
        finally:
            self.active = True
        self.went_back = True
        self.session.inspect_weights("loaded from a checkpoint")

    def postpone(self, totals: torch.Tensor) -> None:
        """Puts the step aside for `resolve_pending_step`, with its batch, and begins the next. No host sync."""
        self.updated()
        copy = AsyncHostCopy(totals)
        self.session.step_is_left_to_the_optimizer(copy)
        self._put_aside = copy, self.session.swap_step()

    def resolve_pending_step(self) -> None:
        """Completes the step put aside, if any: like `skip` if it was bad. All ranks call it in the same step.

        By now, a step later, the optimizer has not applied bad gradients, so the weights are unchanged. If
        the run went back to a checkpoint, the present gradients are of no use any more.
        """
        self.went_back = False
        if self._put_aside is None:
            return
        (totals, before), self._put_aside = self._put_aside, None
        now = self.session.swap_step(before)
        try:
            if totals.read()[0] > 0:
                self.skip()
            else:
                self.done(applied=True)
        finally:
            self.session.swap_step(None if self.went_back else now)

    def updated(self) -> None:
        """Looks at what the optimizer has just written. To be called where `done` comes later than that."""
        if self._under_way and self.active:
            self.session.look_at_update()

    def done(self, applied: bool) -> None:
        """Completes the step that was checked last.

        Raises:
            NumericsError: If the update wrote weights that are not finite, or the step was applied with a loss that is
                not finite, and the policy says so.
        """
        if not self._under_way:
            return
        self._under_way = False
        if not self.active:
            return
        self.session.after_step(applied)
        if applied:
            self._act_on_applied_step()

    def _act_on_applied_step(self) -> None:
        """Does what the policy says of weights or a loss that are not finite after a step that was applied."""
        error = self.session.check_update()
        error = error or self.session.take_error()
        if error is not None:
            raise error
        if self.session.goes_back:
            self._go_back()


def _counting_hook(guard: OptimizerGuard) -> Callable[[torch.optim.Optimizer], None]:
    """A hook that does not keep the guard alive: the optimizer would, and both would outlive the process group."""
    kept = weakref.ref(guard)

    def loaded(_: torch.optim.Optimizer) -> None:
        found = kept()
        if found is not None:
            found.count_from_state()

    return loaded


def _why_alone(reducer: Any) -> str:
    """Why ranks do not have the same gradients, or do not make the same steps; "" if they do."""
    if not reducer.require_backward_grad_sync:
        return "the gradients of this step were not reduced (no_sync)"
    if reducer._join_config.enable:
        return "ranks make different numbers of steps (join)"
    return ""


def _totals_by_torch(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The same totals as `GradientScan.totals`, by torch alone."""
    if not gradients:
        return torch.zeros(2, dtype=torch.float64)
    device = gradients[0].device
    return torch.stack([totals_of(norm_by_torch(gradient).to(device)) for gradient in gradients]).sum(dim=0)
