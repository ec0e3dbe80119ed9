"""What a tracker has to offer. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from hallo_numguard.core.overflow_report import OverflowReport

FIGURES = (
    "loss",
    "loss_scale",
    "gradient_norm",
    "gradient_absmax",
    "gradient_nonfinite",
    "headroom",
    "applied",
    "skipped_in_a_row",
    "findings",
)
"""Every series there is. `loss` and `headroom` are left out of steps that have none; see `feed.figures_of`."""


@runtime_checkable
class Sink(Protocol):
    """Takes figures and reports, on rank 0. One that raises is logged once and gets no more; training goes on."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of one step.

        Args:
            step: Number of the optimizer step, from 1, skipped ones counted; each is written once, in order, and once
                more after the run went back to a checkpoint.
            figures: By a name of `FIGURES`.
        """

    def report(self, report: OverflowReport) -> None:
        """Takes the report on a step whose gradients were not finite; the step's figures may come before or after."""


def tag(name: str) -> str:
    """Returns the name of a series among a run's others."""
    return f"numguard/{name}"
