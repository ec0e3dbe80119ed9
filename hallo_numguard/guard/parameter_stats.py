"""From gradient pieces back to parameters: the arithmetic of a bucket, without any framework in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

NONE = torch.iinfo(torch.int64).max
"""Stands for "no such index" where the lowest index is looked for."""


class Piece(NamedTuple):
    """Which part of which parameter a segment holds.

    Attributes:
        parameter: Position in the guard's list of parameters.
        start: Flat index inside the parameter of the segment's first element.
        run: How many elements lie side by side in the parameter, if not all do: a block of columns.
        stride: From the beginning of one run to that of the next, in the parameter.
    """

    parameter: int
    start: int
    run: int = NONE
    stride: int = 0


NOTHING = Piece(-1, 0)
"""What padding is a piece of."""


class Sums(NamedTuple):
    """Statistics a tensor of a list, all [n].

    Attributes:
        counts: int64 [n, 3], NaN, +Inf and -Inf.
        first: int64 [n], flat index in the whole tensor of the first non-finite element, `NONE` if there is none.
        absmax: float64 [n], of the finite elements.
    """

    counts: torch.Tensor
    first: torch.Tensor
    absmax: torch.Tensor


def by_parameter(packed: torch.Tensor, pieces: Sequence[Piece], parameters: int) -> Sums:
    """Adds up the records of segments by the parameter that they are parts of.

    Args:
        packed: int64 [len(pieces), 8], a `StatsTable.packed`.
        pieces: What each segment holds. A parameter may have several, or none; `NOTHING` is left out.
        parameters: Number of parameters.
    """
    device = packed.device
    rows = parameters + 1  # the last one takes what is of nothing
    counts = torch.zeros((rows, 3), dtype=torch.int64, device=device)
    first = torch.full((rows,), NONE, dtype=torch.int64, device=device)
    absmax = torch.zeros(rows, dtype=torch.float64, device=device)
    if pieces:
        owner, start, run, stride = torch.tensor(pieces, dtype=torch.int64, device=device).unbind(dim=1)
        owner = owner % rows
        index = packed[:, 5]
        place = index // run * stride + index % run + start
        counts.index_add_(0, owner, packed[:, :3])
        first.scatter_reduce_(0, owner, torch.where(index >= 0, place, NONE), "amin")
        absmax.scatter_reduce_(0, owner, packed.view(torch.float64)[:, 6], "amax")
    return Sums(counts[:-1], first[:-1], absmax[:-1])
