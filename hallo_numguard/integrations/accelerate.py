"""The guard of an Accelerator: of its DeepSpeed engine, or of the optimizers that it has prepared.

An optimizer's gradients are looked at before `clip_grad_norm_` or `clip_grad_value_` touches them, or else before the
step. A bad step is left to the GradScaler to skip, where there is one; else it is not made, and `step_was_skipped` says
so, so that no learning rate moves on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.integrations import Guard, engine_of
from hallo_numguard.integrations.patches import Seams
from hallo_numguard.integrations.torch_optim import GuardedOptimizer
from hallo_numguard.integrations.torch_optim.grad_scaler import has_unscaled, scale_of
from hallo_numguard.integrations.torch_optim.model_hooks import Named
from hallo_numguard.integrations.torch_optim.optimizer_guard import Look, OptimizerGuard

_guarded: WeakSet[Any] = WeakSet()


def guard_accelerator(accelerator: Any, config: GuardConfig, on_overflow: OverflowCallback | None) -> Guard:
    """Guards what an Accelerator has prepared; see `attach`."""
    engine = engine_of(accelerator)
    if engine is None:
        return AcceleratorGuard(accelerator, config, on_overflow)
    from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

    return DeepSpeedGuard(engine, config, on_overflow)


class AcceleratorGuard:
    """What `attach` returns for an Accelerator without DeepSpeed: the guards of all its optimizers."""

    def __init__(self, accelerator: Any, config: GuardConfig, on_overflow: OverflowCallback | None) -> None:
        if accelerator in _guarded:
            raise InvalidInput("this Accelerator is guarded already; call detach() on its guard first")
        if not accelerator._optimizers:
            raise InvalidInput(
                "this Accelerator has prepared no optimizer: call attach() after accelerator.prepare(model, optimizer)"
            )
        self._accelerator = accelerator
        self._steps = [
            _Steps(accelerator, optimizer, config, on_overflow, self._is_skipping)
            for optimizer in accelerator._optimizers
        ]
        self._last_bad = self._steps[0]
        self._seams = Seams()
        self._seams.wrap(accelerator, "clip_grad_norm_", self._clip)
        self._seams.wrap(accelerator, "clip_grad_value_", self._clip)
        self._seams.wrap(accelerator, "backward", self._backward)
        for steps in self._steps:
            self._seams.wrap(steps.optimizer, "step", steps.step)
        _guarded.add(accelerator)

    @property
    def last_report(self) -> OverflowReport | None:
        """The report on the last step whose gradients were not finite, or None; of several optimizers, the last's."""
        return self._last_bad.guard.session.last_report

    @property
    def findings(self) -> list[Finding]:
        """What was noticed that is no overflow, or not yet; see `Finding`."""
        return [finding for steps in self._steps for finding in steps.guard.session.findings]

    @property
    def history(self) -> list[StepRecord]:
        """The flight recorder: the last steps, oldest first; of several optimizers, one after the other."""
        return [record for steps in self._steps for record in steps.guard.session.history()]

    def detach(self) -> None:
        """Takes the guard off. All is as it was before `attach`; reports and history stay readable."""
        self._seams.restore()
        for steps in self._steps:
            steps.guard.take_off()
        _guarded.discard(self._accelerator)

    def _is_skipping(self, steps: _Steps) -> None:
        self._last_bad = steps

    def _backward(self, original: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for steps in self._steps:
            steps.before_backward(loss)
        return original(loss, *args, **kwargs)

    def _clip(self, original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for steps in self._steps:
            steps.before_clipping(parameters)
        return original(parameters, *args, **kwargs)


class _Steps:
    """The steps of one optimizer.

    Attributes:
        optimizer: The AcceleratedOptimizer.
        guard: Its guard.
    """

    def __init__(
        self,
        accelerator: Any,
        optimizer: Any,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        is_skipping: Callable[[_Steps], None],
    ) -> None:
        self.optimizer = optimizer
        self._is_skipping = is_skipping
        self._accelerator = accelerator
        self._plain = _plain(optimizer)
        if isinstance(self._plain, GuardedOptimizer):
            raise InvalidInput("this Accelerator was given a GuardedOptimizer: its steps are guarded already")
        self.guard = OptimizerGuard(self._plain, _named(accelerator, self._plain), config, on_overflow)
        self._look: Look | None = None  # of this step, where something has asked for it before `step`

    def before_backward(self, loss: torch.Tensor) -> None:
        """Gives up a step that was looked at for clipping, and then not made. Nobody can tell whose loss it is."""
        if self._look is not None:
            self._look = None
            self.guard.done(applied=False)
        self.guard.saw_loss(loss)

    def before_clipping(self, parameters: Iterable[torch.Tensor]) -> None:
        """Looks at the gradients as they are, if they are complete, and those of `parameters`."""
        trained = {id(parameter) for group in self._plain.param_groups for parameter in group["params"]}
        is_complete = self._accelerator.sync_gradients and self._look is None
        if self.guard.active and is_complete and any(id(parameter) in trained for parameter in parameters):
            self._look = self._looked()

    def step(self, original: Callable[..., Any], closure: Any = None) -> Any:
        """Runs in place of the optimizer's own."""
        if not self.guard.active or not self._accelerator.sync_gradients:
            return original(closure)
        if closure is not None:
            raise InvalidInput(
                "a guarded Accelerator takes no closure: prepare a GuardedOptimizer in place of the optimizer"
            )
        look, self._look = self._look or self._looked(), None
        if look.bad:
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

    def _looked(self) -> Look:
        if self._scaler is None:
            return self.guard.look()
        are_scaled = not has_unscaled(self._scaler, self._plain)
        return self.guard.look(scale_of(self._scaler), are_scaled)

    def _skip(self, original: Callable[..., Any]) -> None:
        self._is_skipping(self)
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


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that was prepared: the one that Accelerate gives to its GradScaler."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer


def _named(accelerator: Any, optimizer: torch.optim.Optimizer) -> Named:
    """The model that the optimizer trains; of several, their parameters, which nobody sees being called together."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    models = [
        model for model in accelerator._models if any(id(parameter) in trained for parameter in model.parameters())
    ]
    if not models:
        raise InvalidInput(
            "this Accelerator has prepared no model that its optimizer trains: call attach() after "
            "accelerator.prepare(model, optimizer)"
        )
    if len(models) == 1:
        return models[0]
    return [(f"{at}.{name}", tensor) for at, model in enumerate(models) for name, tensor in model.named_parameters()]
