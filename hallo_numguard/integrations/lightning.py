"""The guard of a Lightning Trainer: a callback that guards its engine or its optimizers when training begins.

Lightning calls `on_before_optimizer_step` when gradients are unscaled and not clipped yet, from inside the optimizer's
closure. The GradScaler, where there is one, skips a bad step; else the gradients are dropped, and an optimizer without
gradients changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # its older name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]  # the same classes

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import guards_are_disabled
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.feeding_modules import Also, named_modules
from hallo_numguard.guard.guard import Guard
from hallo_numguard.guard.guarded_model import Forward
from hallo_numguard.guard.save_gate import Save
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations import engine_of
from hallo_numguard.integrations.patches import MethodPatches, replaced
from hallo_numguard.integrations.save_gates import SaveGates, saves_part_of
from hallo_numguard.integrations.torch_optim import GuardedOptimizer
from hallo_numguard.integrations.torch_optim.grad_scaler import has_unscaled, scale_of
from hallo_numguard.integrations.torch_optim.optimizer_guard import OptimizerGuard

if TYPE_CHECKING:
    from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard


class NumGuardCallback(Guard, Callback):
    """Guards a Trainer: `Trainer(callbacks=[NumGuardCallback()])`, or `attach(trainer)`, before `fit()`.

    Works with every strategy that trains plain parameters or DTensors, and with DeepSpeed's; not with manual
    optimization. The guard's errors come out of `fit`, which ends as after any exception. `Trainer.save_checkpoint`
    refuses non-finite weights until `detach`, also after `fit`. To explain a bad batch, `training_step` is called again
    with `log` and `log_dict` switched off; other counters in it count that call too.

    Args:
        config: Settings; see `GuardConfig`.
        on_overflow: Called with each `OverflowReport`; see `hallo_numguard.attach`.
        also: Frozen modules outside of the model that feed it; see `hallo_numguard.attach`.
    """

    def __init__(
        self, config: GuardConfig | None = None, on_overflow: OverflowCallback | None = None, also: Also = ()
    ) -> None:
        self._also = named_modules(also)
        self._config = config or GuardConfig()
        self._on_overflow = on_overflow
        self._engine_guard: DeepSpeedGuard | None = None
        self._guards: dict[torch.optim.Optimizer, OptimizerGuard] = {}
        self._under_way: list[OptimizerGuard] = []
        self._handles: list[Any] = []
        self._scale_to_keep: float | None = None
        self._is_off = False
        self._saves: SaveGates | None = None  # these stay on when training is over
        self._saving_trainer: Any = None
        self._is_interrupted = False

    def _sessions(self) -> Sequence[Session]:
        if self._engine_guard is not None:
            return self._engine_guard._sessions()
        return [guard.session for guard in self._guards.values()]

    def detach(self) -> None:
        """Removes the guard, for later calls of `fit()` as well. Reports and history stay readable."""
        self._is_off = True
        self._take_off()
        if self._saves is not None:
            self._saves.leave()

    # -- hooks of the Trainer ----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Attaches: the engine and the optimizers exist by now, and a checkpoint has been loaded."""
        self._take_off()
        if self._is_off or guards_are_disabled():
            return
        self._is_interrupted = False
        self._gate_saves(trainer)
        self._engine_guard, self._guards = None, {}

        def step_number() -> int:
            return int(trainer.global_step) + 1  # counted when the step is over

        engine = engine_of(trainer)
        if engine is not None:
            from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

            forward = _engine_forward(trainer, pl_module, engine) if pl_module.automatic_optimization else None
            self._engine_guard = DeepSpeedGuard(
                engine,
                self._config,
                self._on_overflow,
                forward,
                # Lightning divides before the engine does.
                losses_divided_by=trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1,
                step_number=step_number,
                also=self._also,
            )
            return
        if any(isinstance(optimizer, GuardedOptimizer) for optimizer in trainer.optimizers):
            raise InvalidInput("configure_optimizers has given a GuardedOptimizer: its steps are guarded already")
        observer = functools.partial(_TrainingStepObserver, trainer, pl_module)
        with contextlib.ExitStack() as undo:
            undo.callback(self._take_off)
            for optimizer in trainer.optimizers:
                guard = OptimizerGuard(
                    optimizer,
                    trainer.model,
                    self._config,
                    self._on_overflow,
                    observer,
                    step_number,
                    "Lightning",
                    self._also,
                )
                guard.session.losses_are_shares = True  # Lightning divides by the number of micro-batches
                self._guards[optimizer] = guard
                # Other callbacks may change weights before this one is told that the batch is over.
                self._handles.append(optimizer.register_step_post_hook(functools.partial(_look_at_update, guard)))
            undo.pop_all()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Records losses that `training_step` does not return."""
        if not pl_module.automatic_optimization:
            scaler = _scaler_of(trainer)
            for guard in self._guards.values():
                guard.on_loss(loss if scaler is None else loss.detach() / scaler.get_scale())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Checks the gradients, and keeps bad ones from being applied."""
        self._steps_are_over(trainer)
        guard = self._guards.get(optimizer)
        if guard is None or not guard.active:
            return
        scaler = _scaler_of(trainer)
        if scaler is None:
            check = guard.check()
        else:
            check = guard.check(scale_of(scaler), are_scaled=not has_unscaled(scaler, optimizer))
        if not check.bad:
            self._under_way.append(guard)
            return
        try:
            guard.skip()
        finally:
            if scaler is None:
                optimizer.zero_grad(set_to_none=True)
            elif guard.went_back or guard.session.keeps_scale:
                self._scale_to_keep = scaler.get_scale()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Completes the steps of the batch."""
        self._steps_are_over(trainer)

    def on_train_end(self, *_: Any) -> None:
        """Removes the guard until training begins again."""
        self._take_off()

    def on_exception(self, *_: Any) -> None:
        """Removes the guard until training begins again."""
        self._is_interrupted = True
        self._take_off()

    def _gate_saves(self, trainer: Any) -> None:
        if trainer is self._saving_trainer:
            return
        if self._saves is not None:
            self._saves.remove()
        self._saving_trainer = trainer
        self._saves = SaveGates(self._sessions, self._config.keeper, self._is_saved_by)
        self._saves.add(trainer, "save_checkpoint", self._save)

    def _is_saved_by(self, run: Any) -> bool:
        engine = None if self._engine_guard is None else engine_of(self._saving_trainer)
        return saves_part_of(run, self._saving_trainer.lightning_module) or (engine is not None and run is engine)

    def _save(self, _: Any = None, weights_only: bool | None = None, *__: Any, **___: Any) -> Save:
        # All ranks call it and wait in it for each other, but for one that an exception of its own has interrupted.
        return Save("Trainer.save_checkpoint", bool(weights_only), None if self._is_interrupted else True)

    def _steps_are_over(self, trainer: Trainer) -> None:
        while self._under_way:
            self._under_way.pop(0).done(applied=True)
        if self._scale_to_keep is not None:
            _scaler_of(trainer).update(self._scale_to_keep)
            self._scale_to_keep = None

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._engine_guard is not None:
            self._engine_guard.saves.remove()  # on all ranks, as each ends its training here
            self._engine_guard.detach()
        for guard in self._guards.values():
            guard.done(applied=False)
            guard.take_off()
        self._under_way.clear()


def _look_at_update(guard: OptimizerGuard, *_: Any) -> None:
    guard.updated()


class _TrainingStepObserver:
    """Observes the calls of `training_step`, because not each of them calls the module's own `forward`.

    Args:
        trainer, module: The Trainer and its module.
        on_forward_start: Called with the arguments before the call, by name where they have one. Must not raise.
        on_forward_end: Called with the output. Must not raise.

    Attributes:
        forward: Repeats a call; None if that would step an optimizer.
        forward_compiled: The same, as the module compiles what it calls by itself.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        _: torch.nn.Module,
        on_forward_start: Callable[[tuple[Any, ...], Mapping[str, Any]], None],
        on_forward_end: Callable[[Any], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._on_forward_start = on_forward_start
        self._original = module.training_step
        parameters = inspect.signature(self._original).parameters.values()
        self._names = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
        self._patches = MethodPatches()
        self._patches.observe(module, "training_step", self._on_start, on_forward_end)
        self.forward = self._forward if module.automatic_optimization else None
        self.forward_compiled = self.forward

    def stop(self) -> None:
        """Stops observing."""
        self._patches.restore()

    def _on_start(self, *args: Any, **kwargs: Any) -> None:
        if len(args) <= len(self._names):
            args, kwargs = (), {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._on_forward_start(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with _silence(self._module), self._trainer.precision_plugin.train_step_context():
            return self._original(*args, **kwargs)


def _engine_forward(trainer: Any, module: LightningModule, engine: Any) -> Forward:
    """Calls `training_step` once more as Lightning does: in place of the `forward` of the engine's module."""
    from hallo_numguard.integrations.deepspeed.engine import call_module

    def call(*args: Any, **kwargs: Any) -> Any:
        return call_module(engine, args, kwargs)

    def forward(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with _silence(module), trainer.precision_plugin.train_step_context():
            return trainer.strategy._forward_redirection(call, module, "training_step", *args, **kwargs)

    return forward


@contextlib.contextmanager
def _silence(module: LightningModule) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.enter_context(replaced(module, name, lambda *_, **__: None))
        yield


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def attach(
    trainer: Any, config: GuardConfig, on_overflow: OverflowCallback | None, also: Also = ()
) -> NumGuardCallback:
    """Returns a callback that guards a Trainer from its next `fit()` on; see `hallo_numguard.attach`."""
    if any(isinstance(callback, NumGuardCallback) for callback in trainer.callbacks):
        raise InvalidInput("this Trainer has a NumGuardCallback already")
    callback = NumGuardCallback(config, on_overflow, also)
    trainer.callbacks.insert(0, callback)  # Lightning keeps callbacks that write checkpoints last
    return callback
