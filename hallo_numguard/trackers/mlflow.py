"""MLflow, through the run that is active."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hallo_numguard.core.errors import InvalidInput, NoActiveRun
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.trackers.base import tag


class MlflowSink:
    """Sends a step's figures in the background, one step at a time. The run is found when it is needed.

    MLflow's own `log_metrics` would start a run where none is active; a client that is told the run does not.
    """

    def __init__(self, argument: str | None = None) -> None:
        if argument is not None:
            raise InvalidInput("the active run is used, whichever it is")
        self._run_id: str | None = None
        self._client: Any = None
        self._on_its_way: Any = None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Sink`. Waits for the step before, whose failure it raises."""
        from mlflow.entities import Metric

        run_id = self._find_run()
        if self._on_its_way is not None:
            self._on_its_way.wait()
        now = int(time.time() * 1000)
        metrics = [Metric(tag(name), value, now, step) for name, value in figures.items()]
        self._on_its_way = self._client.log_batch(run_id, metrics=metrics, synchronous=False)

    def report(self, report: OverflowReport) -> None:
        """See `Sink`. A text artifact a step."""
        run_id = self._find_run()
        self._client.log_text(run_id, str(report), tag(f"overflow-step{report.step:08d}.txt"))

    def _find_run(self) -> str:
        if self._run_id is None:
            import mlflow

            run = mlflow.active_run()
            if run is None:
                raise NoActiveRun("no MLflow run is active: call mlflow.start_run() before the first step")
            self._run_id, self._client = run.info.run_id, mlflow.MlflowClient()
        return self._run_id
