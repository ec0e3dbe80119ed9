"""The part of a parameter that this rank holds under ZeRO stage 3."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Slice(NamedTuple):
    """A rank's part of a flattened parameter.

    Attributes:
        start: Flat index of the part's first element in the parameter.
        real: Number of elements without padding, which the last ranks' parts have.
        size: Number of elements with padding, the same on every rank.
    """

    start: int
    real: int
    size: int


def slice_of(parameter: Any) -> Slice:
    """Returns this rank's part of a parameter that DeepSpeed has partitioned."""
    size = parameter.partition_numel()
    start = size * torch.distributed.get_rank(getattr(parameter, "ds_process_group", None))
    return Slice(start, max(0, min(size, parameter.ds_numel - start)), size)
