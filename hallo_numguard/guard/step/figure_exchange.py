"""Figures of a step over ranks that hold slices of the gradients: sent before the optimizer's step, read after it.

Up to `MAX_ROWS` ranks send a row each in one sum; more of them a sum and a maximum, whose sizes do not grow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import contain_failures

PART = ("nan", "inf", "absmax", "sumsq")
"""Figures of a rank's part of the gradients: counts of NaN and of infinite elements, largest absolute value, sum of
squares of the finite elements."""

MAX_ROWS = 128
_ABSMAX = PART.index("absmax")
_HAS_LEFT = len(PART)  # column after them
_MAX_WAIT_SECONDS = 10.0
_NAP_SECONDS = 0.0005


class FigureExchange:
    """One small reduction a step, which every rank starts at the same place, whatever has failed on it.

    Args:
        ranks: Ranks that hold slices.
        device: Device on which they reduce.

    Attributes:
        all_have_left: Whether no rank needs the figures any more: the same on all ranks, in the same step.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._work: list[Any] = []
        self._parts: torch.Tensor | None = None
        self._largest: torch.Tensor | None = None  # of all ranks, where they are too many for a row each
        self.all_have_left = False

    def start(self, part: torch.Tensor | None, has_left: bool = False) -> None:
        """Sends this rank's part, float64 [4] as in `PART`; None where it is unknown. No wait.

        Whatever fails before it, the reduction is entered: the other ranks do.
        """
        parts: torch.Tensor | None = None
        with contain_failures("exchange of figures", "this rank's figures of this step are missing"):
            parts = self._parts_of(part, has_left)
        if parts is None:
            parts = torch.full(self._shape, torch.nan, dtype=torch.float64, device=self._device)
        with contain_failures("exchange of figures", "the figures of this step are this rank's alone"):
            self._parts, self._work, self._largest = parts, [], None
            if not self._has_rows:
                self._largest = parts[0, _ABSMAX].clone()
                self._work.append(self._ranks.start_maximum(self._largest))
            self._work.append(self._ranks.start_sum(parts))

    @property
    def _has_rows(self) -> bool:
        return self._ranks.size <= MAX_ROWS

    @property
    def _shape(self) -> tuple[int, int]:
        return self._ranks.size if self._has_rows else 1, len(PART) + 1

    def _parts_of(self, part: torch.Tensor | None, has_left: bool) -> torch.Tensor:
        """The row of each rank, of which this one fills its own: added up, they are all there. Or one row of all."""
        parts = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        mine = parts[self._ranks.position if self._has_rows else 0]
        if part is None:
            mine[PART.index("sumsq")] = torch.nan
        else:
            mine[: len(PART)].copy_(part, non_blocking=True)
        mine[_HAS_LEFT] = float(has_left)
        return parts

    def finish(self) -> torch.Tensor | None:
        """Returns the figures of all ranks together, as in `PART`; None if nothing is under way, or a rank is missing.

        No host sync on a GPU. On the CPU it waits for ranks that have not come to that step, 10 seconds at most: after
        the optimizer's step, in which the ranks have met, there are none.
        """
        work, parts, self._work, self._parts = self._work, self._parts, [], None
        if not work or parts is None or (self._device.type == "cpu" and not _are_done_in_time(work)):
            return None
        for reduction in work:
            reduction.wait()
        together = parts[:, : len(PART)].sum(dim=0)
        together[_ABSMAX] = parts[:, _ABSMAX].amax() if self._largest is None else self._largest
        return together

    def leave(self) -> None:
        """Takes part for the others' sake, when this rank has no use for figures. Synchronises."""
        work, parts = self._work, self._parts
        if work and parts is not None:
            for reduction in work:
                reduction.wait()
            self.all_have_left = float(parts[:, _HAS_LEFT].sum()) == self._ranks.size
        if not self.all_have_left:
            self.start(None, has_left=True)


def norm_of(figures: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm that figures as in `PART` stand for: NaN or infinite where an element is. 0-dim float64."""
    nan, inf, _, sumsq = figures.unbind()
    return torch.where(nan > 0, torch.nan, torch.where(inf > 0, torch.inf, sumsq.sqrt()))


def _are_done_in_time(work: Sequence[Any]) -> bool:
    deadline = time.monotonic() + _MAX_WAIT_SECONDS
    while not all(reduction.is_completed() for reduction in work):
        if time.monotonic() > deadline:
            return False
        time.sleep(_NAP_SECONDS)
    return True
