"""Base class of all guards."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard.session import Session

P = ParamSpec("P")
T = TypeVar("T")


class Guard(ABC):
    """The results of one session, or of several where a run has several optimizers."""

    @abstractmethod
    def _sessions(self) -> Sequence[Session]:
        """Returns the sessions whose results this guard shows."""

    @abstractmethod
    def detach(self) -> Any:
        """Removes the guard: everything is as it was before. Reports and history stay readable."""

    def wrap_step(self, step: Callable[P, T]) -> Callable[P, T]:
        """Returns the function with its calls recorded, so that one overflow is enough to name its cause in the loss.

        After an overflow that the model alone does not explain, the function is called again, and every operation in it
        and in its backward pass is watched. Without this, the steps after such an overflow are watched as they come.

        Args:
            step: Forward pass and loss as a function of the batch. Returns the loss, or a tuple or dict with the loss
                first or as "loss". Makes no backward pass, and steps no optimizer.
        """

        @functools.wraps(step)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
            calls = [(session, session.on_step_start(step, args, kwargs)) for session in self._sessions()]
            result = step(*args, **kwargs)
            for session, call in calls:
                session.on_step_end(call, result)
            return result

        return recorded

    @property
    def last_report(self) -> OverflowReport | None:
        """The report on the last step whose gradients, or whose loss, were not finite, or None.

        Replaced by one that is no longer provisional when a later step was finite.
        """
        reported = [session for session in self._sessions() if session.last_report is not None]
        return max(reported, key=lambda session: session.reported_at).last_report if reported else None

    @property
    def findings(self) -> list[Finding]:
        """Findings other than overflows; see `Finding`. The last 1000 of each optimizer."""
        return [finding for session in self._sessions() for finding in session.findings]

    @property
    def grad_norm(self) -> torch.Tensor:
        """The last step's gradient norm over the whole model, before clipping and without loss scale.

        A 0-dim tensor: reading it as a number is what waits. NaN before the first step, and where a gradient is NaN.
        """
        norms = [session.grad_norm() for session in self._sessions()]
        if len(norms) == 1:
            return norms[0]
        together = [norm.to(norms[0].device) for norm in norms]
        return torch.linalg.vector_norm(torch.stack(together)) if norms else torch.tensor(math.nan, dtype=torch.float64)

    @property
    def history(self) -> list[StepRecord]:
        """The flight recorder: the last steps, oldest first.

        A step's own figures are of the whole model; those of its `parameters` are of what this rank holds. Histories of
        several optimizers follow one another. Waits for the copy of the last row.
        """
        return [record for session in self._sessions() for record in session.history()]


class DisabledGuard(Guard):
    """The guard of a run that is not guarded, as HALLO_NUMGUARD_DISABLE is set: it has seen nothing.

    Attributes:
        stopped_by: None, where the guard of a Trainer has the error that stopped training.
    """

    stopped_by: None = None

    def _sessions(self) -> Sequence[Session]:
        return []

    def detach(self) -> None:
        """Does nothing."""
