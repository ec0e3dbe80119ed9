"""The recorded steps of several reports as one history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hallo_numguard.core.records import StepRecord
from hallo_numguard.report.inputs import Overflow


@dataclass(frozen=True)
class RankHistory:
    """What one rank has recorded: its steps of all reports, each once, oldest first."""

    label: str
    steps: tuple[StepRecord, ...]


def by_rank(overflows: Sequence[Overflow]) -> list[RankHistory]:
    """Returns every rank's history. Where reports overlap, the later one's record of a step counts."""
    ranks: dict[str, dict[int, StepRecord]] = {}
    for overflow in overflows:
        for item in overflow.ranks:
            ranks.setdefault(item.label, {}).update((step.step, step) for step in item.report.history)
    return [
        RankHistory(label, tuple(steps[number] for number in sorted(steps))) for label, steps in ranks.items() if steps
    ]


def series(steps: Sequence[StepRecord]) -> Iterator[tuple[str, list[float | None]]]:
    """Yields each figure of a history by its name: None where it is not known, NaN where it was not finite."""
    yield "loss", [step.loss for step in steps]
    yield "loss scale", [step.loss_scale for step in steps]
    yield "norm", [math.nan if step.nonfinite else step.norm for step in steps]
    yield "absmax", [math.nan if step.nonfinite else step.absmax for step in steps]
