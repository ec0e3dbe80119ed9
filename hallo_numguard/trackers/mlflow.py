"""MLflow, through the active run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hallo_numguard.core.errors import InvalidInput, NoActiveRun
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.trackers.background import BackgroundQueue
from hallo_numguard.trackers.base import tag

_MAX_REPORT_SECONDS = 5.0


class MlflowSink:
    """Sends figures through MLflow's own queue, and waits for the server on another thread.

    The run is the active one in the first step. MLflow's own `log_metrics` would start a run where none is
    active; a client that is given the run does not.
    """

    def __init__(self, argument: str | None = None) -> None:
        if argument is not None:
            raise InvalidInput("the active run is used, whichever it is")
        self._run_id: str | None = None
        self._client: Any = None
        self._deliveries = BackgroundQueue("MLflow")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends the figures of a step. Raises the error of an earlier step."""
        from mlflow.entities import Metric

        run_id = self._find_run()
        if self._deliveries.is_full:  # the server does not keep up, and MLflow's own queue has no bound
            self._deliveries.dropped += 1
            return
        now = int(time.time() * 1000)
        metrics = [Metric(tag(name), value, now, step) for name, value in figures.items()]
        self._deliveries.put(self._client.log_batch(run_id, metrics=metrics, synchronous=False).wait)

    def report(self, report: OverflowReport) -> None:
        """Sends a text artifact, for which training waits a few seconds: the run may be about to end."""
        run_id, name = self._find_run(), tag(f"overflow-step{report.step:08d}.txt")
        self._deliveries.put(lambda: self._client.log_text(run_id, str(report), name))
        self._deliveries.flush(_MAX_REPORT_SECONDS)

    def close(self) -> None:
        """Waits for deliveries on their way to the server."""
        self._deliveries.close()

    def _find_run(self) -> str:  # on the thread that trains: MLflow's active run is thread-local
        if self._run_id is None:
            import mlflow

            run = mlflow.active_run()
            if run is None:
                raise NoActiveRun("no MLflow run is active: call mlflow.start_run() before the first step")
            self._run_id, self._client = run.info.run_id, mlflow.MlflowClient()
        return self._run_id
