"""A drop-in `torch.optim.Optimizer` that wraps another, with a guard before every step."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import guards_are_disabled
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.feeding_modules import Also
from hallo_numguard.guard.guard import Guard
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations.save_gates import SaveGates, saves_part_of
from hallo_numguard.integrations.torch_optim import grad_scaler as scalers
from hallo_numguard.integrations.torch_optim.model_hooks import Named, inner
from hallo_numguard.integrations.torch_optim.optimizer_guard import GradientCheck, OptimizerGuard

Closure = Callable[[], Any]

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class _Skipped(Exception):
    """Carries the loss out of an optimizer whose step is skipped."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss


def _shared(name: str, text: str) -> Any:
    """An attribute that is the wrapped optimizer's."""

    def read(self: GuardedOptimizer) -> Any:
        return getattr(self._optimizer, name)

    def write(self: GuardedOptimizer, value: Any) -> None:
        setattr(self._optimizer, name, value)

    return property(read, write, doc=text)


class GuardedOptimizer(Guard, torch.optim.Optimizer):
    """Guards the steps of an optimizer: takes the optimizer's place in the training script.

    A step whose gradients are not finite is skipped: the guard finds the cause, and acts by the policy. State and
    parameter groups are the wrapped optimizer's, unchanged: checkpoints of either load into the other. Hooks get the
    wrapped optimizer, and are not called for a skipped step. A copy (deepcopy, pickle) guards the parameters that are
    copied with it, by the same names. With HALLO_NUMGUARD_DISABLE=1 it passes every call on, but gradients are still
    clipped to `clip_norm`, by torch, because the training counts on that.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        model_or_named_parameters: The model, as the script calls it: its own, one in DistributedDataParallel, one with
            `fully_shard` or tensor-parallel DTensors, what torch.compile returns. Or `model.named_parameters()`, which
            gives names, but neither batch nor buffers, and no replay.
        config: Settings; see `GuardConfig`. `mode` has no effect here.
        on_overflow: Called with the `OverflowReport` of a bad step; see `hallo_numguard.attach`.
        clip_norm: Clip gradients to this norm, in place of `clip_grad_norm_`: by the norm that the guard has at hand.
        also: Frozen modules outside of the model that feed it; see `hallo_numguard.attach`. A copy watches none.

    Attributes:
        scaler: The `torch.amp.GradScaler` of the steps. It hands itself over; to be set only if other code
            has replaced `step`, as Accelerate does.

    Raises:
        InvalidInput: If `optimizer` is no optimizer, or trains nothing of the model; if the model is in
            FullyShardedDataParallel.

    Cost: a scan of parameters, buffers and optimizer state now. A step: one pass over the gradients and, on a GPU, one
    wait for its result; with `clip_norm`, one multiplication if the norm is larger, none with a fused optimizer. On
    a GPU a fused optimizer without a GradScaler causes no wait: its kernel skips a bad step, and the report comes in
    the next `step` (or `detach`), until which the batch is kept.
    """

    state = _shared("state", "See torch.optim.Optimizer.")
    param_groups = _shared("param_groups", "See torch.optim.Optimizer.")
    defaults = _shared("defaults", "See torch.optim.Optimizer.")

    def __new__(cls, *_: Any, **__: Any) -> GuardedOptimizer:
        """Makes one that does not guard, if guards are disabled."""
        return super().__new__(_UnguardedOptimizer if cls is GuardedOptimizer and guards_are_disabled() else cls)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_named_parameters: Named,
        config: GuardConfig | None = None,
        on_overflow: OverflowCallback | None = None,
        clip_norm: float | None = None,
        also: Also = (),
    ) -> None:
        self._wrap(optimizer, model_or_named_parameters, config, on_overflow, clip_norm)
        # A scaler that hands itself over saves its pass over the gradients.
        warnings.filterwarnings("ignore", "GradScaler is going to stop passing itself", FutureWarning)
        self._guard = OptimizerGuard(optimizer, self._named, self._config, on_overflow, also=also)
        self._guard.looks_before_clipping = clip_norm is None  # which needs the norm of what the script has left
        self._saves = SaveGates(self._sessions, self._config.keeper, self._is_saved_by)

    def _wrap(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_named_parameters: Named,
        config: GuardConfig | None,
        on_overflow: OverflowCallback | None,
        clip_norm: float | None,
    ) -> None:
        # Optimizer.__init__ would make state and groups of its own, and call every hook a second time.
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, GuardedOptimizer):
            raise InvalidInput(
                f"GuardedOptimizer takes a plain torch.optim.Optimizer, got {type(optimizer).__name__}; the engine of "
                "DeepSpeed is guarded by ng.attach(engine)"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise InvalidInput(f"clip_norm must be positive, got {clip_norm!r}")
        self._optimizer = optimizer
        self._config = config or GuardConfig()
        self._on_overflow = on_overflow
        self._clip_norm = clip_norm
        self._clips = clip_norm is not None
        if not isinstance(model_or_named_parameters, torch.nn.Module):
            model_or_named_parameters = list(model_or_named_parameters)
        self._named = model_or_named_parameters
        self.scaler: Any = None
        self._norm_by_torch = torch.tensor(math.nan)  # of a step that torch has clipped

    @property
    def model(self) -> torch.nn.Module | None:
        """The user's own model, without wrappers; None if only names were given."""
        return inner(self._named) if isinstance(self._named, torch.nn.Module) else None

    def _sessions(self) -> Sequence[Session]:
        return [self._guard.session]

    def detach(self) -> torch.optim.Optimizer:
        """Removes the guard and returns the plain optimizer. This one then only passes calls on, and clips no more.

        Reports and history stay readable.
        """
        if self._guard.active:
            self._guard.resolve_pending_step()
            self._guard.take_off()
        self._saves.leave()
        self._clips = False
        return self._optimizer

    def _is_saved_by(self, run: Any) -> bool:
        """Whether a keeper saves this optimizer, or the model that it trains."""
        parts = run.values() if isinstance(run, Mapping) else ()
        return saves_part_of(run, self.model) or any(part is self or part is self._optimizer for part in parts)

    def watch_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Records the loss, of one element, before its backward, and returns it: `watch_loss(loss).backward()`.

        Not needed where `backward` is called on the loss, multiplied or divided by constants at most: the guard sees
        that. Shown losses are what `history` has: with gradient accumulation show the loss before it is divided, as in
        `(watch_loss(loss) / steps).backward()`.
        """
        self._guard.on_loss(loss, is_certain=True)
        return loss

    # -- torch.optim.Optimizer -----------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(self, closure: Closure | None = None, *, grad_scaler: Any = None) -> Any:
        """Makes a step if the gradients are finite.

        Args:
            closure: Reevaluates the model; each evaluation counts as a step of the guard.
            grad_scaler: The scaler, from `GradScaler.step`.

        Returns:
            The optimizer's result; the loss of the closure, or None, if the step was skipped.

        Raises:
            NumericsError: If the policy says so.
        """
        if grad_scaler is not None:
            self.scaler = self._guard.scaler = grad_scaler
        if grad_scaler is not None or "found_inf" in vars(self):
            return self._step_scaled(was_handed=grad_scaler is not None)
        if not self._guard.active:
            return self._step_unguarded(closure)
        if closure is not None:
            return self._step_with(closure)
        if self._divides and sync_is_costly(self._device):
            return self._step_without_sync()
        return self._finish(self._guard.check())

    def _step_unguarded(self, closure: Closure | None) -> Any:
        """Makes the step as the wrapped optimizer alone would; clips as torch does."""
        if closure is None:
            self._clip_by_torch()
            return self._optimizer.step()
        return self._optimizer.step(self._clipped(closure) if self._clips else closure)

    def _clipped(self, closure: Closure) -> Closure:
        def clipped() -> Any:
            loss = closure()
            self._clip_by_torch()
            return loss

        return clipped

    def _clip_by_torch(self) -> None:
        if self._clips and self._clip_norm is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self._norm_by_torch = torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)

    @property
    def _device(self) -> torch.device:
        return self._guard.device

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells a GradScaler that `step` unscales, and is to be called even for bad gradients."""
        return self._guard.active

    def _step_scaled(self, was_handed: bool) -> Any:
        """Unscales as the scaler would, unless the script has, and reports to it whether all is finite."""
        scaler = self.scaler
        if scaler is None:
            raise InvalidInput(
                "the loss scale is unknown, because something has replaced the step of this optimizer: set its "
                "attribute scaler to the GradScaler"
            )
        has_unscaled = scalers.has_unscaled(scaler, self)
        check = self._guard.check(scalers.scale_of(scaler), are_scaled=not has_unscaled)
        if was_handed and not has_unscaled:
            scalers.set_found_inf(scaler, self, check.bad)
        try:
            return self._finish(check, 1.0 if has_unscaled else check.scale)
        finally:
            if check.bad and (self._guard.went_back or self._guard.session.keeps_scale):
                scalers.set_found_inf(scaler, self, bad=False)

    def _finish(self, check: GradientCheck, scale: float = 1.0) -> Any:
        """Makes the step on gradients that are `scale` times too large, or skips it."""
        if check.bad:
            self._guard.skip()
            return None
        divisor = self._divisor(check, scale)
        try:
            if divisor != 1.0 and self._divides:
                result = self._step_fused(divisor)
            else:
                self._guard.divide(check.gradients, divisor)
                result = self._optimizer.step()
        except BaseException:
            self._guard.done(applied=False)
            raise
        self._guard.done(applied=True)
        return result

    @property
    def _divides(self) -> bool:
        """Whether the optimizer's kernel can divide the gradients itself: not if its tensors are DTensors."""
        return getattr(self._optimizer, "_step_supports_amp_scaling", False) and not self._guard.sharded

    def _divisor(self, check: GradientCheck, scale: float) -> float:
        """Divisor of the gradients: the loss scale times the factor that clips."""
        if self._clip_norm is None:
            return scale
        return scale * max(1.0, (check.norm / scale + CLIP_EPSILON) / self._clip_norm)

    def _step_fused(self, divisor: float | torch.Tensor | None, found_inf: torch.Tensor | None = None) -> Any:
        """Makes a fused optimizer divide while it reads the gradients, and do nothing if they are bad."""
        optimizer: Any = self._optimizer
        if divisor is not None:
            optimizer.grad_scale = torch.as_tensor(divisor, dtype=torch.float32, device=self._device)
        if found_inf is not None:
            optimizer.found_inf = found_inf
        try:
            return optimizer.step()
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)

    def _step_without_sync(self) -> Any:
        """Makes a fused optimizer decide on the step itself; the guard reads the result a step later."""
        self._guard.resolve_pending_step()
        if self._guard.went_back:
            return None
        totals = self._guard.check_without_sync()
        bad, squares = totals.unbind()
        divisor = None
        if self._clip_norm is not None:
            divisor = ((squares.sqrt() + CLIP_EPSILON) / self._clip_norm).clamp(min=1.0).float()
        result = self._step_fused(divisor, found_inf=(bad > 0).float())
        self._guard.postpone(totals)
        return result

    def _step_with(self, closure: Closure) -> Any:
        """Checks the gradients after every evaluation of the closure. A bad one ends the step."""
        before = self._weights() if isinstance(self._optimizer, torch.optim.LBFGS) else None
        evaluations = 0

        def watched() -> Any:
            nonlocal evaluations
            if evaluations:
                self._guard.done(applied=True)
            loss = closure()
            self._guard.on_closure_result(loss)
            check = self._guard.check()
            if check.bad:
                raise _Skipped(loss)
            self._guard.divide(check.gradients, self._divisor(check, 1.0))
            evaluations += 1
            return loss

        try:
            result = self._optimizer.step(watched)
        except _Skipped as skipped:
            if before is not None and evaluations:
                self._go_back(before)
            self._guard.skip()
            return skipped.loss
        except BaseException:
            self._guard.done(applied=False)
            raise
        self._guard.done(applied=True)
        return result

    def _weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def _go_back(self, before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Undoes LBFGS's changes before the bad evaluation. Its curvature history is lost."""
        for parameter, value in before:
            parameter.copy_(value)
        self._optimizer.state.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients to None or zero; see torch.optim.Optimizer."""
        self._guard.gradients_were_cleared()
        self._optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns exactly the wrapped optimizer's state dict."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the wrapped optimizer's state, then scans it and the weights."""
        self._optimizer.load_state_dict(state_dict)
        self._guard.state_was_loaded()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, whose parameters are guarded from now on."""
        self._optimizer.add_param_group(param_group)
        self._guard.add_new_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return self._optimizer.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._optimizer.__setstate__(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return GuardedOptimizer, self._arguments()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedOptimizer:
        optimizer, named, *rest = self._arguments()
        return GuardedOptimizer(*copy.deepcopy((optimizer, named), memo), *rest)

    def _arguments(self) -> tuple[Any, ...]:
        """Arguments of a copy, which has the optimizer's parameters by name."""
        return self._optimizer, self._guard.trained(), self._config, self._on_overflow, self._clip_norm

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # while it is constructed
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __repr__(self) -> str:
        return f"GuardedOptimizer({self._optimizer!r})"


class _UnguardedOptimizer(GuardedOptimizer):
    """What `GuardedOptimizer` makes if guards are disabled: passes calls on to the wrapped optimizer, and clips."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_named_parameters: Named,
        config: GuardConfig | None = None,
        on_overflow: OverflowCallback | None = None,
        clip_norm: float | None = None,
        also: Also = (),
    ) -> None:
        self._wrap(optimizer, model_or_named_parameters, config, on_overflow, clip_norm)

    def _sessions(self) -> Sequence[Session]:
        return []

    @property
    def grad_norm(self) -> torch.Tensor:
        """The norm by which torch has clipped the last step; NaN if it has not."""
        return self._norm_by_torch

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return False  # a GradScaler unscales before `step`, and skips by itself

    def detach(self) -> torch.optim.Optimizer:
        self._clips = False
        return self._optimizer

    def watch_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    @_disable_dynamo
    def step(self, closure: Closure | None = None, *, grad_scaler: Any = None) -> Any:
        return self._step_unguarded(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._optimizer.add_param_group(param_group)

    def _arguments(self) -> tuple[Any, ...]:
        named = self._named.named_parameters() if isinstance(self._named, torch.nn.Module) else self._named
        trained = {parameter for group in self.param_groups for parameter in group["params"]}
        kept = [(name, parameter) for name, parameter in named if parameter in trained]
        return self._optimizer, kept, self._config, self._on_overflow, self._clip_norm


def sync_is_costly(device: torch.device) -> bool:
    """Whether reading a result waits for all earlier work of the device."""
    return device.type != "cpu"
