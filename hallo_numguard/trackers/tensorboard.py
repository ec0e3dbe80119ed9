"""TensorBoard, through the run's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.trackers.base import tag


class TensorBoardSink:
    """Writes to a SummaryWriter of torch.utils.tensorboard or tensorboardX, which stays the caller's to close."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Sink`."""
        for name, value in figures.items():
            self._writer.add_scalar(tag(name), value, step)

    def report(self, report: OverflowReport) -> None:
        """Writes and flushes the text: the run may be about to end."""
        block = "\n".join(f"    {line}" for line in str(report).splitlines())  # Markdown, word for word
        self._writer.add_text(tag("report"), block, report.step)
        self._writer.flush()
