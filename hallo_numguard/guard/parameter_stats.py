"""From pieces in buckets and shards back to whole parameters; framework-independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hallo_numguard.ops import device as runtime
from hallo_numguard.ops.table import StatsTable

NONE = torch.iinfo(torch.int64).max
"""Stands for "no such index" in minima of indices."""


class Piece(NamedTuple):
    """Which part of which parameter a segment holds.

    Attributes:
        parameter: Position in the guard's list of parameters.
        start: Flat index inside the parameter of the segment's first element.
        run: Number of adjacent elements in the parameter, for a block of columns. Default: all.
        stride: Distance between the beginnings of two runs in the parameter, in elements.
    """

    parameter: int
    start: int
    run: int = NONE
    stride: int = 0


PADDING = Piece(-1, 0)
"""Piece of no parameter."""


class ParameterStats(NamedTuple):
    """Statistics of n whole tensors, each combined from its pieces.

    Attributes:
        counts: Number of NaN, +Inf and -Inf. int64 [n, 3].
        first: Flat index in the whole tensor of the first non-finite element, `NONE` if there is none. int64 [n].
        absmax: Largest absolute value of the finite elements. float64 [n].
    """

    counts: torch.Tensor
    first: torch.Tensor
    absmax: torch.Tensor

    def bad_positions(self) -> list[int]:
        """Returns the positions of the tensors that are not finite, in order. Synchronises."""
        positions: list[int] = (self.first != NONE).nonzero().flatten().tolist()
        return positions

    def only_negative_infinity(self, position: int) -> bool:
        """Returns whether -Inf is all that is not finite, as in an additive mask."""
        nan, pos_inf, _ = self.counts[position].tolist()
        return nan == 0 and pos_inf == 0


def by_parameter(table: StatsTable, pieces: Sequence[Piece], parameters: int) -> ParameterStats:
    """Adds up the records of segments by parameter.

    Args:
        table: Statistics, one row per segment.
        pieces: Piece that each segment holds. A parameter may have several, or none; `PADDING` is left out.
        parameters: Number of parameters.
    """
    device = table.packed.device
    rows = parameters + 1  # the last one takes the padding
    counts = torch.zeros((rows, 3), dtype=torch.int64, device=device)
    first = torch.full((rows,), NONE, dtype=torch.int64, device=device)
    absmax = torch.zeros(rows, dtype=torch.float64, device=device)
    if pieces:
        words = torch.tensor(pieces, dtype=torch.int64, device="cpu")
        owner, start, run, stride = runtime.send(words.numpy().tobytes(), device).view_as(words).unbind(dim=1)
        owner = owner % rows
        index = table.first_nonfinite
        place = index // run * stride + index % run + start
        counts.index_add_(0, owner, table.nonfinite_counts)
        first.scatter_reduce_(0, owner, torch.where(index >= 0, place, NONE), "amin")
        absmax.scatter_reduce_(0, owner, table.absmax, "amax")
    return ParameterStats(counts[:-1], first[:-1], absmax[:-1])
