"""Distribution of figures to the sinks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.trackers.base import Sink, figures_of

_log = logging.getLogger("hallo_numguard")


class Feed:
    """Passes steps and reports to every sink, and drops a sink that fails. No host sync.

    Args:
        sinks: Sinks of this rank.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._skipped = 0  # steps in a row

    def write(self, records: Sequence[StepRecord], findings: int) -> None:
        """Writes steps.

        Args:
            records: Steps that have not been written yet, oldest first.
            findings: Number of findings so far.
        """
        for record in records:
            self._skipped = 0 if record.applied else self._skipped + 1
            figures = figures_of(record) | {"skipped_in_a_row": self._skipped, "findings": findings}
            self._each("write", record.step, figures)

    def report(self, report: OverflowReport) -> None:
        """Passes a report on."""
        self._each("report", report)

    def close(self) -> None:
        """Waits for the last deliveries of sinks that have a `close`."""
        for sink in [sink for sink in self._sinks if hasattr(sink, "close")]:
            self._call(sink, "close")

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            self._call(sink, method, *args)

    def _call(self, sink: Sink, method: str, *args: Any) -> None:
        try:
            getattr(sink, method)(*args)
        except Exception as error:  # noqa: BLE001 - of trackers, networks and third parties; training goes on
            self._sinks.remove(sink)
            expected = isinstance(error, (ImportError, NumGuardError))
            what = str(error) if expected else f"{type(error).__name__}: {error}"
            _log.warning("%s gets no more figures; training goes on: %s", type(sink).__name__, what)
            _log.debug("the traceback of that failure", exc_info=not expected)
