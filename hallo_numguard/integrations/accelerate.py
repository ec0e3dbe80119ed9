"""The guard of an Accelerator: of its DeepSpeed engine, or of the optimizers that it has prepared.

An optimizer's gradients are checked before `clip_grad_norm_` or `clip_grad_value_` touches them, or else before the
step. The GradScaler, where there is one, skips a bad step; else it is not made. `step_was_skipped` is set either way,
so that no learning rate moves on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.feeding_modules import Also
from hallo_numguard.guard.guard import Guard
from hallo_numguard.guard.save_gate import Save
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations import engine_of
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.integrations.save_gates import SaveGates
from hallo_numguard.integrations.torch_optim import GuardedOptimizer
from hallo_numguard.integrations.torch_optim.clipping import clip_by_wide_norm, largest_safe_norm
from hallo_numguard.integrations.torch_optim.grad_scaler import has_unscaled, scale_of
from hallo_numguard.integrations.torch_optim.model_hooks import Named, inner
from hallo_numguard.integrations.torch_optim.optimizer_guard import GradientCheck, OptimizerGuard
from hallo_numguard.integrations.torch_optim.parameter_gradients import trained
from hallo_numguard.integrations.torch_optim.sharding import is_sharded

if TYPE_CHECKING:
    from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

_guarded: WeakSet[Any] = WeakSet()


def attach(
    accelerator: Any, config: GuardConfig, on_overflow: OverflowCallback | None, also: Also = ()
) -> AcceleratorGuard | DeepSpeedGuard:
    """Guards the engine or the optimizers of an Accelerator; see `hallo_numguard.attach`."""
    return guard_of(accelerator, config, on_overflow, also)


def guard_of(
    accelerator: Any,
    config: GuardConfig,
    on_overflow: OverflowCallback | None,
    also: Also = (),
    step_number: Callable[[], int] | None = None,
    losses_are_shares: bool = False,
) -> AcceleratorGuard | DeepSpeedGuard:
    """Does the same as `attach`, with what a Trainer knows beside.

    Args:
        accelerator: The Accelerator, after `prepare`.
        config: Settings.
        on_overflow: Called with each report.
        also: Modules that feed the model.
        step_number: Returns the number of the step under way. Default: see `OptimizerGuard`; the engine's own.
        losses_are_shares: Whether each micro-batch's loss is divided by their number before `accelerator.backward`.
    """
    engine = engine_of(accelerator)
    if engine is None:
        guard = AcceleratorGuard(accelerator, config, on_overflow, step_number, also)
        for session in guard._sessions():
            session.losses_are_shares = losses_are_shares
        return guard
    from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

    of_engine = DeepSpeedGuard(engine, config, on_overflow, step_number=step_number, also=also)
    # Around the engine's own: the Accelerator deletes older checkpoints before it calls that.
    of_engine.saves.add(accelerator, "save_state", lambda *_, **__: Save("Accelerator.save_state", on_all_ranks=True))
    of_engine.saves.add(accelerator, "save_model", _model_save)
    return of_engine


class AcceleratorGuard(Guard):
    """What `attach` returns for an Accelerator without DeepSpeed: the guards of all its optimizers.

    Attributes:
        saves: Checks before the Accelerator saves.
    """

    def __init__(
        self,
        accelerator: Any,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        step_number: Callable[[], int] | None = None,
        also: Also = (),
    ) -> None:
        if accelerator in _guarded:
            raise InvalidInput("this Accelerator is guarded already; call detach() on its guard first")
        if not accelerator._optimizers:
            raise InvalidInput(
                "this Accelerator has prepared no optimizer: call attach() after accelerator.prepare(model, optimizer)"
            )
        self._accelerator = accelerator
        self._steps: list[_Steps] = []
        self._patches = MethodPatches()
        self.saves = SaveGates(self._sessions, config.keeper, lambda run: run is accelerator)
        with contextlib.ExitStack() as undo:
            undo.callback(self.detach)
            undo.callback(self.saves.remove)
            for optimizer in accelerator._optimizers:
                self._steps.append(_Steps(accelerator, optimizer, config, on_overflow, step_number, also))
            self._patches.wrap(accelerator, "clip_grad_norm_", self._clip_norm)
            self._patches.wrap(accelerator, "clip_grad_value_", self._clip)
            self._patches.observe(accelerator, "backward", self._on_backward)
            for steps in self._steps:
                self._patches.wrap(steps.optimizer, "step", steps.step)
                self._patches.observe(steps.optimizer, "zero_grad", steps.before_clearing)
            self.saves.add(accelerator, "save_state", self._state_save)
            self.saves.add(accelerator, "save_model", _model_save)
            _guarded.add(accelerator)
            undo.pop_all()

    def _sessions(self) -> Sequence[Session]:
        return [steps.guard.session for steps in self._steps]

    def detach(self) -> None:
        """Removes the guard. All is as it was before `attach`; reports and history stay readable."""
        self._patches.restore()
        self.saves.leave()
        for steps in self._steps:
            steps.guard.take_off()
        _guarded.discard(self._accelerator)

    def _state_save(self, *_: Any, **__: Any) -> Save:
        # Scripts call it on the main process alone, as those of diffusers do, unless it waits for the others itself.
        waits = self._accelerator.project_configuration.automatic_checkpoint_naming
        return Save("Accelerator.save_state", on_all_ranks=True if waits else None)

    def _on_backward(self, loss: torch.Tensor, *_: Any, **__: Any) -> None:
        for steps in self._steps:
            steps.before_backward(loss)

    def _clip(self, original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self._checked(parameters), *args, **kwargs)

    def _checked(self, parameters: Any) -> list[torch.Tensor]:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for steps in self._steps:
            steps.before_clipping(parameters)
        return parameters

    def _clip_norm(
        self,
        original: Callable[..., Any],
        parameters: Any,
        max_norm: Any,
        norm_type: Any = 2,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Clips as torch does, but by a norm in float64 if torch's is not finite in the gradients' own dtype."""
        parameters = self._checked(parameters)
        norm = math.hypot(*(steps.finite_norm for steps in self._steps))
        if float(norm_type) == 2 and norm >= min(steps.norm_limit for steps in self._steps):
            probes = self._steps[0].guard.session.probes
            wide_norm = probes.run("clipping", self._clip_by_wide_norm, parameters, float(max_norm))
            if wide_norm is not None:
                return wide_norm
        return original(parameters, max_norm, norm_type, *args, **kwargs)

    def _clip_by_wide_norm(self, parameters: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor | None:
        # Scaled gradients are of float32, and their norm is far from its largest number.
        if self._accelerator.scaler is not None or any(is_sharded(parameter) for parameter in parameters):
            return None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return clip_by_wide_norm(gradients, max_norm)


class _Steps:
    """The steps of one optimizer.

    Attributes:
        optimizer: The AcceleratedOptimizer.
        guard: Guard of that optimizer.
        norm_limit: Norm below which torch's own norm of the optimizer's gradients is certainly finite.
    """

    def __init__(
        self,
        accelerator: Any,
        optimizer: Any,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        step_number: Callable[[], int] | None = None,
        also: Also = (),
    ) -> None:
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._plain = _plain(optimizer)
        if isinstance(self._plain, GuardedOptimizer):
            raise InvalidInput("this Accelerator was given a GuardedOptimizer: its steps are guarded already")
        named = _named(accelerator, self._plain)
        self.guard = OptimizerGuard(
            self._plain, named, config, on_overflow, step_number=step_number, framework="Accelerate", also=also
        )
        self._check: GradientCheck | None = None  # of this step, if clipping came before `step`
        trained = (parameter for group in self._plain.param_groups for parameter in group["params"])
        self.norm_limit = min(largest_safe_norm(parameter.dtype) for parameter in trained)

    @property
    def finite_norm(self) -> float:
        """Norm of this step's gradients; 0 if they were not checked, or are not finite."""
        return 0.0 if self._check is None or self._check.bad else self._check.norm

    def before_backward(self, loss: torch.Tensor) -> None:
        """Drops a check whose step was not made after clipping. The loss may be any optimizer's."""
        if self._check is not None:
            self._check = None
            self.guard.done(applied=False)
        self.guard.on_loss(loss)

    def before_clearing(self, *_: Any, **__: Any) -> None:
        """Forgets the losses, if the gradients are about to be cleared."""
        if self._accelerator.sync_gradients:
            self.guard.gradients_were_cleared()

    def before_clipping(self, parameters: Iterable[torch.Tensor]) -> None:
        """Checks the gradients, if they are complete and those of `parameters`."""
        trained = {id(parameter) for group in self._plain.param_groups for parameter in group["params"]}
        is_complete = self._accelerator.sync_gradients and self._check is None
        if self.guard.active and is_complete and any(id(parameter) in trained for parameter in parameters):
            self._check = self._check_gradients()

    def step(self, original: Callable[..., Any], closure: Any = None) -> Any:
        """Runs in place of the optimizer's own step."""
        if not self.guard.active or not self._accelerator.sync_gradients:
            return original(closure)
        if closure is not None:
            raise InvalidInput(
                "a guarded Accelerator takes no closure: prepare a GuardedOptimizer in place of the optimizer"
            )
        check, self._check = self._check or self._check_gradients(), None
        if check.bad:
            return self._skip(original)
        try:
            result = original()
        except BaseException:
            self.guard.done(applied=False)
            raise
        if self._scaler is None:
            self.optimizer._is_overflow = False
        self.guard.done(applied=True)
        return result

    @property
    def _scaler(self) -> Any:
        return self.optimizer.scaler

    def _check_gradients(self) -> GradientCheck:
        if self._scaler is None:
            return self.guard.check()
        are_scaled = not has_unscaled(self._scaler, self._plain)
        return self.guard.check(scale_of(self._scaler), are_scaled)

    def _skip(self, original: Callable[..., Any]) -> None:
        try:
            self.guard.skip()
        finally:
            if self._scaler is None:
                self.optimizer._is_overflow = True
            else:
                self._let_the_scaler_skip(original)

    def _let_the_scaler_skip(self, original: Callable[..., Any]) -> None:
        scale = self._scaler.get_scale()
        original()
        if self.guard.went_back or self.guard.session.keeps_scale:
            self._scaler.update(scale)


def _model_save(model: Any = None, *_: Any, **__: Any) -> Save:
    """Accelerator.save_model, which may be given another model, and be called on one rank alone."""
    return Save("Accelerator.save_model", True, module=inner(model) if isinstance(model, torch.nn.Module) else None)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that was prepared: the one that Accelerate gives to its GradScaler."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def _named(accelerator: Any, optimizer: torch.optim.Optimizer) -> Named:
    """The model that the optimizer trains. Of several models, or none, named parameters, without observed calls."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = [model for model in accelerator._models if any(id(parameter) in ids for parameter in model.parameters())]
    if not accelerator._models:
        raise InvalidInput(
            "this Accelerator has prepared no model that its optimizer trains: call attach() after "
            "accelerator.prepare(model, optimizer)"
        )
    if not models:  # loss weights with an optimizer of their own
        return [(name, parameter) for parameter, name in trained(optimizer)]
    if len(models) == 1:
        return models[0]
    return [(f"{at}.{name}", tensor) for at, model in enumerate(models) for name, tensor in model.named_parameters()]
