"""Hands what has arrived on the host to the sinks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.trackers.base import Sink

_log = logging.getLogger("hallo_numguard")


class Feed:
    """Passes every step on, and drops a sink that fails. Waits for nothing.

    Args:
        sinks: Where to.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._skipped = 0  # steps in a row

    def write(self, records: Sequence[StepRecord], findings: int) -> None:
        """Writes steps.

        Args:
            records: Those that have not been written yet, oldest first.
            findings: Number of findings so far.
        """
        for record in records:
            self._skipped = 0 if record.applied else self._skipped + 1
            figures = figures_of(record) | {"skipped_in_a_row": self._skipped, "findings": findings}
            self._each("write", record.step, figures)

    def report(self, report: OverflowReport) -> None:
        """Passes a report on."""
        self._each("report", report)

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # noqa: BLE001 - of trackers, networks and third parties; training goes on
                self._sinks.remove(sink)
                expected = isinstance(error, (ImportError, NumGuardError))
                name = type(sink).__name__
                _log.warning("%s gets no more figures; training goes on: %s", name, error, exc_info=not expected)


def figures_of(record: StepRecord) -> dict[str, float]:
    """Returns the figures of one step. Those of gradients are unscaled, before clipping, of what this rank owns.

    `loss` is there if the guard could see it, `headroom` (bits until the largest gradient overflows) in half precision.
    """
    figures: dict[str, float] = {
        "gradient_norm": record.norm / record.loss_scale,
        "gradient_absmax": record.absmax / record.loss_scale,
        "gradient_nonfinite": record.nonfinite,
        "loss_scale": record.loss_scale,
        "applied": int(record.applied),
    }
    optional = {"loss": record.loss, "headroom": record.headroom}
    return figures | {name: value for name, value in optional.items() if value is not None}
