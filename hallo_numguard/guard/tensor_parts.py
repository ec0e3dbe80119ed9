"""Parts of tensors that model parallelism has cut: each rank calls its part a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hallo_numguard.guard.parameter_stats import NONE, ParameterStats


class Shard(NamedTuple):
    """Place of a rank's part in the whole tensor: a block along one dimension, or an unknown one.

    Attributes:
        start: Flat index in the whole tensor of the part's first element.
        run: Number of elements of the part that are adjacent in the whole tensor. Default: all.
        stride: Distance between the beginnings of two runs in the whole tensor, in elements.
    """

    start: int = 0
    run: int = NONE
    stride: int = 0


def block(whole: Sequence[int], dimension: int, begin: int, size: int) -> Shard:
    """Returns the place of a block.

    Args:
        whole: Shape of the whole tensor.
        dimension: Dimension along which it is cut.
        begin: First index of the part along that dimension.
        size: Number of indices of the part along it.
    """
    inner = math.prod(whole[dimension + 1 :])
    return Shard(begin * inner, max(1, size * inner), whole[dimension] * inner)


def in_whole_tensors(stats: ParameterStats, shards: Sequence[Shard | None]) -> ParameterStats:
    """Returns statistics of parts with the indices of the whole tensors.

    Args:
        stats: Statistics, one row per tensor.
        shards: Place of each part; None of a tensor that is not cut.
    """
    if not any(shards):
        return stats
    places = torch.tensor([shard or Shard() for shard in shards], dtype=torch.int64, device=stats.first.device)
    start, run, stride = places.unbind(dim=1)
    whole = stats.first // run * stride + stats.first % run + start
    return stats._replace(first=torch.where(stats.first == NONE, NONE, whole))
