"""Chunks of segments for the GPU kernels: tables that both kernels read, and the memory that they write to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.records import RECORD_FIELDS
from hallo_numguard.ops import device as runtime
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout

# Elements. Small enough for a few MiB to keep every multiprocessor busy, large enough for the record of a chunk to
# cost a thousandth of the traffic. csrc/cuda/kernels.cuh has the same number.
CHUNK = 1 << 15

_WORDS = len(RECORD_FIELDS)


@dataclass(frozen=True)
class Chunks:
    """The chunks of one launch. A chunk lies inside one segment; an empty segment has one empty chunk.

    The kernels write to a buffer of `rows` records, the segments' first. A segment's only chunk writes the segment's
    record; several chunks write records of their own behind, which are then merged.

    Attributes:
        table: Segment, number inside the segment, length in elements, row of the record; sorted by the segment's dtype.
            int32 [chunks, 4].
        splits: Segment of several chunks, the first row of its chunks, and the row after the last. int32 [splits, 3].
        launches: Dtype, first chunk, number of chunks.
        segments: Number of segments.
        rows: Number of records in the buffer.
    """

    table: torch.Tensor
    splits: torch.Tensor
    launches: tuple[tuple[torch.dtype, int, int], ...]
    segments: int
    rows: int

    @functools.cached_property
    def pointers(self) -> tuple[int, list[tuple[int, int, int]], int, int]:
        """The tables in the order that csrc/python/cuda_bindings.cpp takes."""
        launches = [(FORMATS[dtype].code, first, count) for dtype, first, count in self.launches]
        return self.table.data_ptr(), launches, self.splits.data_ptr(), len(self.splits)

    def buffer(self) -> torch.Tensor:
        """int64 [rows, 8]: uninitialised memory for the records, on the device of the tables."""
        return torch.empty((self.rows, _WORDS), dtype=torch.int64, device=self.table.device)


def chunks_of(sizes: torch.Tensor, codes: torch.Tensor, device: torch.device) -> Chunks:
    """Returns the chunks of segments.

    Args:
        sizes: int64 [segments] on the CPU, in elements.
        codes: int64 [segments] on the CPU: `Format.code` of the dtype of each.
        device: Device for the tables.

    Cost: a few passes over the tables, and a copy to the device. No host sync, but not for the hot path.
    """
    counts = ((sizes + CHUNK - 1) // CHUNK).clamp(min=1)
    order = torch.argsort(codes, stable=True)
    segment = torch.repeat_interleave(order, counts[order])  # of each chunk
    before = (counts[order].cumsum(0) - counts[order]).repeat_interleave(counts[order])
    number = torch.arange(segment.numel(), device="cpu") - before
    length = (sizes[segment] - number * CHUNK).clamp(max=CHUNK)

    split = counts > 1
    row = segment.clone()
    of_split = split[segment]
    row[of_split] = sizes.numel() + torch.arange(int(of_split.sum()), device="cpu")
    in_order = order[split[order]]
    ends = sizes.numel() + counts[in_order].cumsum(0)
    splits = torch.stack([in_order, ends - counts[in_order], ends], dim=1)

    launches = []
    first = 0
    for code, dtype in enumerate(FORMATS):
        n_chunks = int(counts[codes == code].sum())
        if n_chunks > 0:
            launches.append((dtype, first, n_chunks))
        first += n_chunks
    return Chunks(
        table=_sent(torch.stack([segment, number, length, row], dim=1), device),
        splits=_sent(splits, device),
        launches=tuple(launches),
        segments=sizes.numel(),
        rows=sizes.numel() + int(of_split.sum()),
    )


@functools.lru_cache(maxsize=64)
def chunks_of_one(numel: int, dtype: torch.dtype, device: torch.device) -> Chunks:
    """Returns the chunks of a single segment."""
    return chunks_of(_on_host([numel]), _on_host([FORMATS[dtype].code]), device)


@functools.lru_cache(maxsize=16)
def chunks_of_list(sizes: bytes, codes: bytes, device: torch.device) -> Chunks:
    """Returns the chunks of a list of tensors, cached by sizes: gradients keep them from step to step.

    Args:
        sizes: int64 sizes in elements, as bytes, which are quick to hash.
        codes: int8 values of `Format.code`, as bytes.
        device: Device for the tables.
    """
    return chunks_of(
        torch.frombuffer(bytearray(sizes), dtype=torch.int64),
        torch.frombuffer(bytearray(codes), dtype=torch.int8).to(torch.int64),
        device,
    )


def chunks_of_layout(layout: Layout, dtype: torch.dtype, device: torch.device) -> tuple[Chunks, torch.Tensor]:
    """Returns the chunks of a layout, and where its segments begin: int64 [segments], in bytes, on the device."""

    def make(offsets: list[int]) -> tuple[Chunks, torch.Tensor]:
        ends = _on_host(offsets)
        sizes = ends[1:] - ends[:-1]
        codes = torch.full_like(sizes, FORMATS[dtype].code)
        return chunks_of(sizes, codes, device), runtime.send_to_keep(
            (ends[:-1] * dtype.itemsize).numpy().tobytes(), device
        )

    return layout.table(f"chunks.{device}.{dtype}", make)


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns an int64 table of the CPU as int32 on a device."""
    words = table.to(torch.int32).numpy().tobytes()
    whole = words + bytes(-len(words) % 8)
    return runtime.send_to_keep(whole, device).view(torch.int32)[: table.numel()].view_as(table)


def _on_host(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
