"""Figures of every step for the trackers that DeepSpeed's configuration names (TensorBoard, W&B, Comet, CSV)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hallo_numguard.core.overflow_report import OverflowReport

_SERIES = ("gradient_norm", "gradient_absmax", "gradient_nonfinite", "loss_scale", "skipped_in_a_row")


class MonitorSink:
    """Writes five series through the engine's own monitor, against samples like DeepSpeed's own series.

    It takes numbers only: reports do not go there.

    Args:
        engine: The engine.
        step_number: Returns the number of the step under way, as the figures have it.
    """

    def __init__(self, engine: Any, step_number: Callable[[], int]) -> None:
        self._engine = engine
        self._step_number = step_number

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Sink`."""
        samples = self._samples_after(step)
        self._engine.monitor.write_events([(f"Numguard/{name}", figures[name], samples) for name in _SERIES])

    def report(self, report: OverflowReport) -> None:
        """See `Sink`."""

    def _samples_after(self, step: int) -> int:
        """Number of samples after this step; the engine counts a step later than it calls the guard."""
        engine = self._engine
        return int(engine.global_samples + (step + 1 - self._step_number()) * engine.train_batch_size())


def monitor_sinks(engine: Any, step_number: Callable[[], int]) -> list[MonitorSink]:
    """Returns the sink of an engine whose configuration names a tracker; else an empty list."""
    return [MonitorSink(engine, step_number)] if getattr(getattr(engine, "monitor", None), "enabled", False) else []
