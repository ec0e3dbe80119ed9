"""Weights & Biases, through the active run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hallo_numguard.core.errors import InvalidInput, NoActiveRun
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.trackers.base import tag

_STEP = tag("step")


class WandbSink:
    """Adds figures to the row that the run writes next, so that the run's own step is never moved.

    The run is the active one in the first step. If several steps pass between two rows of the run, the last
    step's figures stay. `numguard/step` is their axis.
    """

    def __init__(self, argument: str | None = None) -> None:
        if argument is not None:
            raise InvalidInput("the active run is used, whichever it is")
        self._found: Any = None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Sink`."""
        row = {tag(name): value for name, value in figures.items()}
        self._run().log({_STEP: step, **row}, commit=False)

    def report(self, report: OverflowReport) -> None:
        """Adds the text. Sends an alert if training will not go on by itself."""
        run = self._run()
        run.summary[tag("report")] = str(report)
        if report.recoverable is not True:
            run.alert(title=report.headline()[:100], text=str(report), level="WARN", wait_duration=300)

    def _run(self) -> Any:
        if self._found is None:
            import wandb

            if wandb.run is None:
                raise NoActiveRun("no W&B run is active: call wandb.init() before the first step")
            self._found = wandb.run
            self._found.define_metric(_STEP, hidden=True)
            self._found.define_metric(tag("*"), step_metric=_STEP)
        return self._found
