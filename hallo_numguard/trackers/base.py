"""The interface of trackers, and the figures that they get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord

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
"""Names of all series. `loss` and `headroom` are left out of steps that have none."""


def figures_of(record: StepRecord) -> dict[str, float]:
    """Returns the figures of one step, of the whole model's gradients, unscaled and before clipping.

    `loss` is included if the guard saw it, `headroom` (bits until the largest gradient overflows) in half precision.
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


@runtime_checkable
class Sink(Protocol):
    """Takes figures and reports, on rank 0. One that raises is logged once and gets no more; training goes on.

    Both methods are called inside the training step, on its thread, so that figures can join what the run logs for the
    same step. A sink that may take long hands over to a `background.BackgroundQueue`, and has a `close()` that waits
    for the last deliveries: it is called when the guard is detached.
    """

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of one step.

        Args:
            step: Number of the optimizer step, from 1, skipped ones counted; each is written once, in order, and once
                more after the run was rolled back to a checkpoint.
            figures: Values by name, of `FIGURES`.
        """

    def report(self, report: OverflowReport) -> None:
        """Takes the report on a step with non-finite gradients; the step's figures may come before or after it."""


def tag(name: str) -> str:
    """Returns the name of a series among a run's others."""
    return f"numguard/{name}"
