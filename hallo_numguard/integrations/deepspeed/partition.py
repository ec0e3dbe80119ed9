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
    return _slice(parameter, size, getattr(parameter, "ds_process_group", None))


def secondary_slice_of(parameter: Any) -> Slice | None:
    """Returns this rank's part of the copy that ZeRO++ hpZ keeps of a parameter; None if there is none to be read."""
    secondary = getattr(parameter, "ds_secondary_tensor", None)
    if secondary is None or not secondary.is_floating_point():  # quantised
        return None
    return _slice(parameter, secondary.ds_numel, parameter.ds_zero_param_process_group)


def _slice(parameter: Any, size: int, group: Any) -> Slice:
    start = size * torch.distributed.get_rank(group)
    return Slice(start, max(0, min(size, parameter.ds_numel - start)), size)
