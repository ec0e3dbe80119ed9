"""Where each of DeepSpeed's optimizers keeps the reduced gradients when its step begins, and what each piece is of.

A source is made once; a scan on a clean step does no more than DeepSpeed's way of keeping gradients forces: for flat
buffers nothing a parameter, for the lists of ZeRO stages 1 and 2 one step of a list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from hallo_numguard.core.errors import UnsupportedDeepSpeed
from hallo_numguard.guard.guarded_model import Scanned
from hallo_numguard.guard.parameter_stats import NOTHING, Piece
from hallo_numguard.integrations.deepspeed.partition import slice_of
from hallo_numguard.integrations.deepspeed.version import unknown_layout
from hallo_numguard.ops.api import multi_tensor_stats, tensor_stats
from hallo_numguard.ops.layout import Layout

Segment = tuple[int, int, Piece]
"""Begin and end inside a flat tensor, and what it is of."""

_NOTHING_SEEN = [0, 0, 0, 0, 0, -1, 0, 0]

Positions = dict[torch.Tensor, int]
"""Of each parameter, its position in the guard's list."""


class GradientSource(Protocol):
    """This rank's reduced gradients.

    Attributes:
        sliced: Whether every rank holds another slice; else every rank holds all of them.
    """

    sliced: bool

    def scan(self) -> Scanned:
        """Reads them once. Between the last backward of a step and the optimizer's step."""

    def drop(self) -> None:
        """Forgets the gradients of a step that was skipped.

        Buffers that stay would keep those of a parameter that takes no part in the next step, and apply them there: a
        NaN of the skipped step reaches the weights with a finite loss (ZeRO 1 to 3 with offload), or every later step
        is skipped as well (ZeRO 3).
        """


class ParameterGradients:
    """`parameter.grad`, averaged over the ranks: stage 0."""

    sliced = False

    def __init__(self, groups: Iterable[Sequence[torch.Tensor]], positions: Positions) -> None:
        self._parameters = [parameter for group in groups for parameter in group]
        self._positions = [positions[parameter] for parameter in self._parameters]

    def scan(self) -> Scanned:
        """See `GradientSource.scan`."""
        held = [
            (parameter.grad, position)
            for parameter, position in zip(self._parameters, self._positions, strict=True)
            if parameter.grad is not None
        ]
        table = multi_tensor_stats([gradient for gradient, _ in held])
        return Scanned(table.packed, [Piece(position, 0) for _, position in held])

    def drop(self) -> None:
        """See `GradientSource.drop`: the optimizer has set them to None."""


class PartitionLists:
    """ZeRO stages 1 and 2: scattered tensors, at new addresses every step, of the same sizes."""

    sliced = True

    def __init__(self, optimizer: Any, positions: Positions) -> None:
        self._optimizer = optimizer
        self._positions = positions
        self._sizes: list[int] = []
        self._pieces: list[Piece] = []

    def scan(self) -> Scanned:
        """See `GradientSource.scan`."""
        tensors: list[torch.Tensor] = []
        owners: list[tuple[int, int]] = []
        groups = []
        for group in range(len(self._optimizer.bit16_groups)):
            gradients = self._optimizer.averaged_gradients.get(group) or ()
            real = [item for item in gradients if not getattr(item, "_zero_padding", False)]
            # Older releases append the padding without a mark: it is what has no parameter.
            held = min(len(real), len(self._optimizer.params_in_partition[group]))
            groups.append(slice(len(tensors), len(tensors) + held))
            tensors += real[:held]
            owners += [(group, index) for index in range(held)]
        sizes = [tensor.numel() for tensor in tensors]
        if sizes != self._sizes:
            self._pieces = [self._piece(*owner, size) for owner, size in zip(owners, sizes, strict=True)]
            self._sizes = sizes
        return Scanned(multi_tensor_stats(tensors).packed, self._pieces, groups)

    def drop(self) -> None:
        """See `GradientSource.drop`: the optimizer has let go of them."""

    def _piece(self, group: int, index: int, size: int) -> Piece:
        parameter = self._optimizer.params_in_partition[group][index]
        # Only a partition's first parameter can begin in its middle. A float before DeepSpeed 0.19.7.
        start = int(self._optimizer.first_offset[group]) if index == 0 else 0
        if start + size > parameter.numel():
            raise unknown_layout(
                self._optimizer,
                "averaged_gradients",
                f"{size} elements from {start} on for a parameter of {parameter.numel()}",
            )
        return Piece(self._positions[parameter], start)


class FlatBuffers:
    """Flat tensors that stay where they are.

    Args:
        buffers: Of each: a way to get it (it may be None in a step), and its segments as (begin, end, piece), in order;
            what lies between them is padding.
        sliced: See `GradientSource`.
        groups: How many segments each of the optimizer's groups has, in order; a group a buffer if left out.
        copies: Gives other places that hold the same gradients.
        wait: Waits until what is still on its way to the buffers has arrived.
    """

    def __init__(
        self,
        buffers: Sequence[tuple[Callable[[], torch.Tensor | None], Sequence[Segment]]],
        sliced: bool,
        groups: Sequence[int] | None = None,
        copies: Callable[[], Iterable[torch.Tensor | None]] = tuple,
        wait: Callable[[], object] = tuple,
    ) -> None:
        self.sliced = sliced
        self._wait = wait
        self._copies = copies
        self._buffers = []
        self._pieces: list[Piece] = []
        ends = [0]
        for get, segments in buffers:
            offsets, pieces, rows = _without_gaps(segments)
            self._buffers.append((get, Layout(offsets)))
            counts = [len(segments)] if groups is None else groups
            at = itertools.accumulate(counts, initial=0)
            ends += [len(self._pieces) + rows[end] for end in itertools.islice(at, 1, None)]
            self._pieces += pieces
        self._groups = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def scan(self) -> Scanned:
        """See `GradientSource.scan`."""
        self._wait()
        tables = []
        for get, layout in self._buffers:
            flat = get()
            if flat is None:  # nothing arrived for this group
                tables.append(torch.tensor(_NOTHING_SEEN).repeat(layout.segments, 1))
            else:
                tables.append(tensor_stats(flat.view(-1), layout).packed)
        packed = tables[0] if len(tables) == 1 else torch.cat(tables)
        return Scanned(packed, self._pieces, self._groups)

    def drop(self) -> None:
        """See `GradientSource.drop`."""
        for flat in [*(get() for get, _ in self._buffers), *self._copies()]:
            if flat is not None:
                flat.zero_()


def offloaded_partitions(optimizer: Any, positions: Positions) -> FlatBuffers:
    """ZeRO stages 1 and 2 with offload: a flat float32 gradient on the CPU for every group."""
    buffers = []
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        segments = []
        for parameter in optimizer.params_in_partition[group]:
            place = optimizer.grad_position[optimizer.get_param_id(parameter)]
            _, start, begin, size = (int(value) for value in place)
            segments.append((begin, begin + size, Piece(positions[parameter], start)))
        segments.sort()
        _check_end(optimizer, "single_partition_of_fp32_groups", segments, flat.numel())
        buffers.append((lambda flat=flat: flat.grad, segments))
    return FlatBuffers(buffers, sliced=True, wait=lambda: _wait_for_copies(optimizer))


def _wait_for_copies(optimizer: Any) -> None:
    """DeepSpeed copies gradients from the GPU while the backward pass goes on, and waits itself in its step."""
    if hasattr(optimizer, "_wait_for_offload_copies"):
        optimizer._wait_for_offload_copies()
    elif torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def partition_buffer(optimizer: Any, positions: Positions) -> FlatBuffers:
    """ZeRO stage 3: one flat tensor for all groups, every rank's piece of each parameter."""
    segments = []
    begin = 0
    for parameter in itertools.chain.from_iterable(optimizer.fp16_groups):
        mine = slice_of(parameter)
        segments.append((begin, begin + mine.real, Piece(positions[parameter], mine.start)))
        begin += mine.size
    if begin != optimizer.grad_partitions_flat_buffer.numel():
        raise unknown_layout(
            optimizer,
            "grad_partitions_flat_buffer",
            f"{optimizer.grad_partitions_flat_buffer.numel()} elements where the parameters account for {begin}",
        )
    return FlatBuffers(
        [(lambda: optimizer.grad_partitions_flat_buffer, segments)],
        sliced=True,
        groups=[len(group) for group in optimizer.fp16_groups],
        copies=lambda: [flat.grad for flat in optimizer.fp32_partitioned_groups_flat if flat is not None],
    )


def whole_flat_groups(optimizer: Any, positions: Positions) -> FlatBuffers:
    """BF16_Optimizer: a flat tensor for every group, the whole of it on every rank."""
    buffers = []
    for group, parameters in enumerate(optimizer.bf16_groups):
        ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
        segments = [
            (end - parameter.numel(), end, Piece(positions[parameter], 0))
            for parameter, end in zip(parameters, ends, strict=True)
        ]
        numel = optimizer.fp32_groups_gradients_flat[group].numel()
        _check_end(optimizer, "fp32_groups_gradients_flat", segments, numel)
        buffers.append((lambda group=group: optimizer.fp32_groups_gradients_flat[group], segments))
    return FlatBuffers(buffers, sliced=False)


def _check_end(optimizer: Any, attribute: str, segments: Sequence[Segment], numel: int) -> None:
    end = segments[-1][1] if segments else 0
    if end > numel:
        raise unknown_layout(optimizer, attribute, f"{numel} elements where the parameters account for {end}")


def _without_gaps(segments: Sequence[Segment]) -> tuple[list[int], list[Piece], list[int]]:
    """Offsets of segments that touch, what each is of (padding is of nothing), and how many the first n have become."""
    offsets, pieces, rows = [0], [], [0]
    for begin, end, piece in segments:
        if begin < offsets[-1]:
            raise UnsupportedDeepSpeed(f"gradients that overlap: one begins at {begin}, before {offsets[-1]}")
        if begin > offsets[-1]:
            offsets.append(begin)
            pieces.append(NOTHING)
        offsets.append(end)
        pieces.append(piece)
        rows.append(len(pieces))
    return offsets, pieces, rows
