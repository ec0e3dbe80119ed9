"""The guard of a Hugging Face Trainer: a callback that guards the Trainer's accelerator when training begins.

The Trainer's own hook before the optimizer comes too late: after clipping, and under DeepSpeed after the step.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import guards_are_disabled
from hallo_numguard.core.errors import InvalidInput, NumericsError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.guard.feeding_modules import Also, named_modules
from hallo_numguard.guard.guard import Guard
from hallo_numguard.guard.save_gate import Save
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations import accelerate
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.integrations.save_gates import SaveGates
from hallo_numguard.integrations.torch_optim.model_hooks import inner
from hallo_numguard.tracing.rerun import is_rerunning
from hallo_numguard.trackers.base import tag

if TYPE_CHECKING:
    from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

_log = logging.getLogger("hallo_numguard")

_LOGGED: dict[str, Callable[[str], bool]] = {
    "few": lambda name: name in ("gradient_norm", "gradient_nonfinite", "skipped_in_a_row"),
    "all": lambda _: True,
    "none": lambda _: False,
}
_FOLDER = "numguard"  # in the Trainer's output folder
_FILTER = (
    "TrainingArguments.logging_nan_inf_filter is on: the Trainer logs the average of earlier losses in place of one "
    "that is NaN or Inf. logging_nan_inf_filter=False shows it; so does numguard/loss, which "
    "NumGuardCallback(log_figures='all') logs."
)


class NumGuardCallback(Guard, TrainerCallback):
    """Guards a Trainer: `trainer.add_callback(NumGuardCallback())`, or `attach(trainer)`, before `train()`.

    Works with and without DeepSpeed. Where the policy says raise, training is stopped as callbacks stop it
    (`control.should_training_stop`): nothing is saved over earlier checkpoints, every callback is told that training
    has ended, and then `train()` raises the error, on every rank; in a trial of `hyperparameter_search` it returns, as
    the search goes on. The report is in `dump_dir`, by default `numguard` in the Trainer's output folder. The Trainer's
    log rows get three figures of the last step: `numguard/gradient_norm`, `numguard/gradient_nonfinite` and
    `numguard/skipped_in_a_row`. Checkpoints and `save_model` refuse non-finite weights until `detach`, so also after
    training.

    Args:
        config: Settings; see `GuardConfig`.
        on_overflow: Called with each `OverflowReport`; see `hallo_numguard.attach`.
        on_stop: What `train()` does in the end if the guard has stopped training: "raise" (default) raises the error;
            "return" returns, and only `stopped_by` tells.
        log_figures: Figures that the Trainer's log rows get: "few" (default), "all" (what `GuardConfig.sinks` get), or
            "none".
        also: Frozen modules outside of the model that feed it; see `hallo_numguard.attach`.

    Attributes:
        stopped_by: Error that stopped training, or None.

    Raises:
        InvalidInput: If `on_stop` or `log_figures` is none of these.
    """

    def __init__(
        self,
        config: GuardConfig | None = None,
        on_overflow: OverflowCallback | None = None,
        on_stop: str = "raise",
        log_figures: str = "few",
        also: Also = (),
    ) -> None:
        if on_stop not in ("raise", "return"):
            raise InvalidInput(f"on_stop must be 'raise' or 'return', got {on_stop!r}")
        if log_figures not in _LOGGED:
            raise InvalidInput(f"log_figures must be 'few', 'all' or 'none', got {log_figures!r}")
        self.stopped_by: NumericsError | None = None
        self._config = config or GuardConfig()
        self._on_overflow = on_overflow
        self._on_stop = on_stop
        self._also = named_modules(also)
        self._is_over = True  # the training, for all callbacks
        self._trainer: Any = None  # known once it calls
        self._guard: accelerate.AcceleratorGuard | DeepSpeedGuard | None = None
        self._patches = MethodPatches()
        self._end = MethodPatches()  # of the last thing that training calls
        self._saves: SaveGates | None = None  # these stay on when training is over
        self._saving_trainer: Any = None
        self._figures = _LastFigures(log_figures)

    def _sessions(self) -> Sequence[Session]:
        return [] if self._guard is None else self._guard._sessions()

    def detach(self) -> None:
        """Removes the guard, for later calls of `train()` as well. Reports and history stay readable."""
        self._take_off()
        self._end.restore()
        if self._saves is not None:
            self._saves.leave()
        self._saving_trainer = None
        if self._trainer is not None:
            self._trainer.remove_callback(self)

    # -- hooks of the Trainer ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Attaches: the engine, or the prepared optimizer, exists by now."""
        if guards_are_disabled():
            return
        if args.logging_nan_inf_filter and state.is_world_process_zero:
            _log.info(_FILTER)
        self.guard(_trainer_on_the_stack())

    def guard(self, trainer: Any) -> None:
        """Attaches to a Trainer that is about to train, or is training."""
        self._take_off()
        self.stopped_by, self._is_over = None, False
        self._gate_saves(trainer)
        self._trainer = trainer
        folder = self._config.dump_dir or Path(trainer.args.output_dir) / _FOLDER
        config = replace(self._config, sinks=[*self._config.sinks, self._figures], dump_dir=folder)
        self._guard = accelerate.guard_of(
            trainer.accelerator,
            config,
            self._on_overflow,
            self._also,
            step_number=lambda: int(trainer.state.global_step) + 1,  # counted when the step is over
            # Else the Accelerator divides, which shows its backward the whole loss.
            losses_are_shares=trainer.accelerator.gradient_accumulation_steps == 1,
        )
        self._patches = MethodPatches()
        self._patches.wrap(trainer.accelerator, "backward", self._unless_stopped)  # DeepSpeed steps in there
        self._patches.wrap(trainer.optimizer, "step", self._unless_stopped)
        self._patches.wrap(trainer, "log", self._log_figures)
        self._patches.wrap(trainer, "compute_loss", self._compute_loss)
        if hasattr(trainer, "_maybe_log_save_evaluate"):
            self._patches.wrap(trainer, "_maybe_log_save_evaluate", self._unless_refused)
        self._end.restore()
        self._end = MethodPatches()
        last = _last_call(trainer)
        if self._on_stop == "raise" and hasattr(trainer, last):
            self._end.wrap(trainer, last, self._raise_when_over)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops training if the guard has raised."""
        if self.stopped_by is not None:
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False

    on_epoch_end = on_step_end  # the Trainer calls it for the epoch that is broken off as well

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Removes the guard until training begins again, but for the checks before the Trainer saves."""
        self._is_over = True
        if self._guard is not None:
            self._guard.saves.remove()  # all ranks come here
        self._take_off()

    # -- patches in place of the Trainer's methods -------------------------------------------------------------------

    def _unless_stopped(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except NumericsError as error:
            self._stop(error)
            return None

    def _unless_refused(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stops training if a checkpoint is refused; callbacks are not told of one that there is not."""
        try:
            return original(*args, **kwargs)
        except NumericsError as error:
            self._stop(error)
            self.on_step_end(self._trainer.args, self._trainer.state, self._trainer.control)
            return None

    def _stop(self, error: NumericsError) -> None:
        self.stopped_by = error
        _log.error("training is stopped: %s", error if self._on_stop == "return" else error.report.headline())

    def _raise_when_over(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not self._is_over:
            return result
        self._end.restore()
        if self.stopped_by is not None and not self._trainer.state.is_hyper_param_search:
            raise self.stopped_by
        return result

    def _gate_saves(self, trainer: Any) -> None:
        if trainer is self._saving_trainer:
            return
        if self._saves is not None:
            self._saves.remove()
        self._saves, self._saving_trainer = SaveGates(self._sessions), trainer
        self._saves.add(trainer, "_save_checkpoint", self._checkpoint)
        self._saves.add(trainer, "save_model", self._model)

    def _checkpoint(self, *_: Any, **__: Any) -> Save:
        return Save("Trainer._save_checkpoint", self._trainer.args.save_only_model, on_all_ranks=True)

    def _model(self, *_: Any, **__: Any) -> Save:
        # All ranks may call it, or one alone. The Trainer may have got another model since it trained.
        return Save("Trainer.save_model", True, module=inner(self._trainer.model))

    def _compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.wrap_step(original)(*args, **kwargs)

    def _log_figures(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if is_rerunning():  # a user's compute_loss may log
            return None
        if "loss" in logs:  # of training: not those of an evaluation, nor the summary at the end
            logs.update(self._figures.last)
        return original(logs, *args, **kwargs)

    def _take_off(self) -> None:
        self._patches.restore()
        if self._guard is not None:
            self._guard.detach()


def attach(
    trainer: Any, config: GuardConfig, on_overflow: OverflowCallback | None, also: Also = ()
) -> NumGuardCallback:
    """Returns a callback that guards a Trainer from its next `train()` on; see `hallo_numguard.attach`."""
    if any(isinstance(callback, NumGuardCallback) for callback in trainer.callback_handler.callbacks):
        raise InvalidInput("this Trainer is guarded already; call detach() on its guard first")
    callback = NumGuardCallback(config, on_overflow, also=also)
    trainer.add_callback(callback)
    if trainer.is_in_train:
        callback.guard(trainer)
    return callback


def _last_call(trainer: Any) -> str:
    """Name of the method that the Trainer's training calls last, after the callbacks' `on_train_end`."""
    if hasattr(trainer, "_finalize_training"):  # transformers >= 5
        return "_finalize_training"
    has_neftune = getattr(trainer, "neftune_noise_alpha", None) is not None
    return "_deactivate_neftune" if has_neftune else "_finish_current_push"


def _trainer_on_the_stack() -> Any:
    """The Trainer that calls: callbacks get its model and optimizer, but no reference to the Trainer.

    Raises:
        InvalidInput: If none does.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise InvalidInput("NumGuardCallback is a callback of a transformers.Trainer: trainer.add_callback(...)")


class _LastFigures:
    """Keeps the figures of the last step.

    Args:
        which: "few", "all" or "none".
    """

    def __init__(self, which: str) -> None:
        self._which = which
        self.last: dict[str, float] = {}

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Sink`."""
        self.last = {tag(name): value for name, value in figures.items() if _LOGGED[self._which](name)}

    def report(self, report: OverflowReport) -> None:
        """See `Sink`."""
