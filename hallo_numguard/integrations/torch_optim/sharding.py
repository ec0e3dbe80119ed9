"""The part of a DTensor that this rank holds: FSDP2's slices of rows, tensor parallelism's blocks, copies of either."""

from __future__ import annotations

import math
from typing import Any

import torch

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.parameter_stats import NONE


def is_sharded(tensor: torch.Tensor) -> bool:
    """Returns whether it is a DTensor. Imports nothing."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Any) -> torch.Tensor:
    """Returns this rank's part of a tensor.

    Raises:
        InvalidInput: If the part is a summand that is not reduced yet.
    """
    if not is_sharded(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise InvalidInput(f"a gradient that is not reduced yet: {tensor.placements}")
    return tensor.to_local()


def counts_here(tensor: Any) -> bool:
    """Returns whether this rank's part is counted: of several copies, only the one on the lowest ranks is."""
    if not is_sharded(tensor):
        return torch.distributed.get_rank() == 0
    mesh = tensor.device_mesh
    if not bool((mesh.mesh == 0).any()):
        return False
    coordinate = mesh.get_coordinate()
    copied = [at for at, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return all(coordinate[at] == 0 for at in copied)


def place_of(tensor: Any) -> tuple[int, int, int]:
    """Returns where this rank's part lies in the whole tensor: see `Piece` for start, run and stride.

    Raises:
        InvalidInput: If it is sharded along more dimensions than the first and one other.
    """
    if not is_sharded(tensor):
        return 0, NONE, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(whole, tensor.device_mesh, tensor.placements)
    start = sum(at * math.prod(whole[dimension + 1 :]) for dimension, at in enumerate(offset))
    cut = [dimension for dimension, size in enumerate(shape) if dimension > 0 and size != whole[dimension]]
    if len(cut) > 1:
        raise InvalidInput(f"a tensor that is cut along dimensions {cut}: {tensor.placements}")
    if not cut:
        return start, NONE, 0
    return start, math.prod(shape[cut[0] :]), math.prod(whole[cut[0] :])


def find(tensor: Any, flat: int) -> int | None:
    """Returns the position in this rank's part of the element with flat index `flat`; None if it is elsewhere."""
    start, run, stride = place_of(tensor)
    row, column = divmod(flat - start, stride or NONE)
    inside = row * run + column
    return inside if row >= 0 and column < run and inside < local(tensor).numel() else None
