"""The optimizer's own tensors: moments and float32 master copies, and which part of which parameter they hold.

A step with a non-finite gradient is skipped, so what is not finite in here did not come from a gradient: it was there
before, or memory was damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hallo_numguard.guard.guarded_model import Scanned
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.integrations.deepspeed.gradients import Positions
from hallo_numguard.integrations.deepspeed.partition import slice_of
from hallo_numguard.integrations.deepspeed.version import kind_of
from hallo_numguard.ops.api import multi_tensor_stats

Part = tuple[torch.Tensor, Piece]


def scan_state(optimizer: Any, positions: Positions) -> Scanned:
    """Reads all of it once, a row a parameter and tensor. Not for the hot path."""
    parts = list(_parts(optimizer, positions))
    table = multi_tensor_stats([tensor.detach() for tensor, _ in parts])
    return Scanned(table.packed, [piece for _, piece in parts])


def moments_of(optimizer: Any, parameter: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Returns what this rank has of a parameter's moments and master copy: slices, and where they begin in it."""
    return [(tensor, piece.start) for tensor, piece in _parts(optimizer, _Only(parameter)) if piece.parameter == 0]


class _Only(dict[torch.Tensor, int]):
    """Positions in which one parameter is the first, and all others are none."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__({parameter: 0})

    def __missing__(self, _: torch.Tensor) -> int:
        return -1


def is_sliced(optimizer: Any) -> bool:
    """Returns whether every rank holds another slice of it; else each holds all of it."""
    return kind_of(optimizer, "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer", "BF16_Optimizer")


def _parts(optimizer: Any, positions: Positions) -> Iterator[Part]:
    if kind_of(optimizer, "DeepSpeedZeroOptimizer_Stage3"):
        yield from _stage3_parts(optimizer, positions)
    elif kind_of(optimizer, "DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        yield from _linked_parts(optimizer, positions)
    elif kind_of(optimizer, "FP16_UnfusedOptimizer"):
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                yield from _whole(optimizer.optimizer, master, positions[parameter], is_master=True)
    elif hasattr(optimizer, "param_groups") and hasattr(optimizer, "state") and not hasattr(optimizer, "fp16_groups"):
        for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            yield from _whole(optimizer, parameter, positions[parameter], is_master=False)


def _linked_parts(optimizer: Any, positions: Positions) -> Iterator[Part]:
    """DeepSpeed links each parameter to its fragment of the flat partition (tensor_fragment.py)."""
    is_bf16 = kind_of(optimizer, "BF16_Optimizer")
    flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    for parameter, position in positions.items():
        link: Any = getattr(parameter, "_hp_mapping", None)
        if link is None:
            continue
        flat = flats[link.param_group_index]
        begin, size = int(link.hp_fragment_address.start), int(link.hp_fragment_address.numel)
        for tensor in [flat, *_moments(optimizer.optimizer, flat)]:
            yield tensor.view(-1)[begin : begin + size], Piece(position, int(link.lp_fragment_address.start))


def _stage3_parts(optimizer: Any, positions: Positions) -> Iterator[Part]:
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        if flat is None:
            continue
        tensors = [flat, *_moments(optimizer.optimizer, flat)]
        begin = 0
        for parameter in parameters:
            mine = slice_of(parameter)
            for tensor in tensors:
                if not _share_memory(tensor, parameter.ds_tensor):
                    yield tensor.view(-1)[begin : begin + mine.real], Piece(positions[parameter], mine.start)
            begin += mine.size


def _share_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a master copy is none: in float32, stage 3 of older releases lets the optimizer work on the weights."""
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _whole(optimizer: Any, key: torch.Tensor, position: int, is_master: bool) -> Iterator[Part]:
    for tensor in ([key] if is_master else []) + _moments(optimizer, key):
        yield tensor.view(-1), Piece(position, 0)


def _moments(optimizer: Any, key: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the state that are as large as what they are of; a step count is not."""
    state = optimizer.state.get(key, {})
    return [
        value
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() == key.numel() and value.is_floating_point()
    ]
