"""Errors, one class per cause. Messages say what happened, what was expected, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hallo_numguard.core.overflow_report import OverflowReport


class NumGuardError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class InvalidInput(NumGuardError, ValueError):
    """An argument is not accepted: a dtype, an offset, an option."""


class BackendUnavailable(NumGuardError):
    """HALLO_NUMGUARD_BACKEND or HALLO_NUMGUARD_ISA names something that cannot run here."""


class UnsupportedDeepSpeed(NumGuardError):
    """The engine, or the installed DeepSpeed, lacks something that the guard needs."""


class NoActiveRun(NumGuardError):
    """A tracker has no active run to send figures to; none is started for them."""


class CheckpointFailed(NumGuardError):
    """A checkpoint could not be saved, or there is none to roll back to. Earlier checkpoints are untouched."""


class NumericsError(NumGuardError):
    """Training was stopped by policy, after the overflow of `report`."""

    def __init__(self, report: OverflowReport) -> None:
        super().__init__(str(report))
        self.report = report
