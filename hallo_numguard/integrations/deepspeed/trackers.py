"""Figures of every step for the trackers that DeepSpeed's configuration names (TensorBoard, W&B, Comet, CSV)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hallo_numguard.records import StepRecord

_LOOK_BACK = 4  # steps; a row has usually arrived by the next step


class Trackers:
    """Writes through the engine's own monitor, on the step axis of DeepSpeed's own series.

    Five series. Those of gradients are of what rank 0 owns: its slice under ZeRO, all of them at stage 0.

    Args:
        engine: A DeepSpeed engine.
        arrived: Gives the last steps whose figures have arrived on the host, without waiting.
    """

    def __init__(self, engine: Any, arrived: Callable[[int], list[StepRecord]]) -> None:
        self._engine = engine
        self._arrived = arrived
        self._written = 0  # number of the last step
        monitor = getattr(engine, "monitor", None)
        self._enabled = bool(getattr(monitor, "enabled", False))

    def write(self, skipped_in_a_row: int) -> None:
        """Writes what has arrived since the last call. Costs nothing where no tracker is configured."""
        if not self._enabled:
            return
        events = []
        for record in self._arrived(_LOOK_BACK):
            if record.step <= self._written:
                continue
            self._written = record.step
            samples = self._samples_after(record.step)
            events += [(f"Numguard/{name}", value, samples) for name, value in _figures(record).items()]
            events.append(("Numguard/skipped_in_a_row", skipped_in_a_row, samples))
        if events:
            self._engine.monitor.write_events(events)

    def _samples_after(self, step: int) -> int:
        """Samples that were seen when this step was over; the engine counts a step later than it calls the guard."""
        engine = self._engine
        return int(engine.global_samples + (step - engine.global_steps) * engine.train_batch_size())


def _figures(record: StepRecord) -> dict[str, float]:
    return {
        "gradient_norm": record.norm / record.loss_scale,
        "gradient_absmax": record.absmax / record.loss_scale,
        "gradient_nonfinite": record.nonfinite,
        "loss_scale": record.loss_scale,
    }
