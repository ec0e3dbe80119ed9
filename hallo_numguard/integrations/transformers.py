"""The guard of a Trainer that has no engine yet: DeepSpeed is initialised when training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hallo_numguard.errors import InvalidInput
from hallo_numguard.records import Finding, OverflowReport, StepRecord


class TrainerGuard(TrainerCallback):
    """What `attach(trainer)` returns before `train()`; the guard itself is made when training begins.

    Args:
        trainer: A `transformers.Trainer`.
        guard_engine: Guards its engine; None if it has none.
    """

    def __init__(self, trainer: Any, guard_engine: Callable[[], Any]) -> None:
        self._trainer = trainer
        self._guard_engine = guard_engine
        self._guard: Any = None
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Attaches: the Trainer has made its engine by now."""
        self.detach_engine()
        self._guard = self._guard_engine()
        if self._guard is None:
            raise InvalidInput("this Trainer does not use DeepSpeed: pass TrainingArguments(deepspeed=...)")

    @property
    def last_report(self) -> OverflowReport | None:
        """The report on the last step whose gradients were not finite, or None."""
        return None if self._guard is None else self._guard.last_report

    @property
    def findings(self) -> list[Finding]:
        """What was noticed that is no overflow, or not yet; see `Finding`."""
        return [] if self._guard is None else self._guard.findings

    @property
    def history(self) -> list[StepRecord]:
        """The flight recorder: the last steps of what this rank owns, oldest first."""
        return [] if self._guard is None else self._guard.history

    def detach(self) -> None:
        """Takes the guard off, for later calls of `train()` as well. Reports and history stay readable."""
        self._trainer.remove_callback(self)
        self.detach_engine()

    def detach_engine(self) -> None:
        """Takes the guard off the engine that it is on, if any."""
        if self._guard is not None:
            self._guard.detach()
