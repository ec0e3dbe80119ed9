"""The Triton kernels on a GPU, or in Triton's interpreter: their tables and their launches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from hallo_numguard.errors import BackendUnavailable
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.records import RECORD_FIELDS

INTERPRET_VARIABLE = "TRITON_INTERPRET"

_WORDS = len(RECORD_FIELDS)

# Sizes are in elements. A chunk is small enough for a few MiB to keep every multiprocessor busy; a
# block is two loads of 16 bytes in flight for each of 128 threads, and adds at most 32 squares to a
# float32 sum, which costs 1e-6 of the norm at worst.
_CHUNK = 1 << 15
_BLOCK = {1: 2048, 2: 2048, 4: 1024, 8: 512}
_RESCAN_BLOCK = 512
_COMBINE_BLOCK = 256
_UNROLL = 4
# Triton 3.10 changes the default of the second; a fused multiply and add is one rounding less.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# Bits of 2^-50 and 2^60. float32 holds the squares of a chunk whose largest magnitude lies between:
# they stay below 2^120, and what underflows is below 2^-34 of the chunk. Those of narrower formats
# always fit.
_SAFE = {torch.float32: (0x26800000, 0x5D800000), torch.bfloat16: (0x2680, 0x5D80)}


@functools.cache
def kernels() -> ModuleType | None:
    """Returns the module of the kernels, or None where Triton is not installed."""
    try:
        from hallo_numguard.ops import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def unavailable(device_type: str) -> str | None:
    """Returns why this backend cannot run on such a device, or None if it can."""
    if device_type not in ("cpu", "cuda"):
        return f"runs on cuda, not on {device_type}"
    if kernels() is None:
        return "triton is not installed: pip install 'hallo-numguard[triton]'"
    interpreted = os.environ.get(INTERPRET_VARIABLE) == "1"
    if device_type == "cpu" and not interpreted:
        return f"runs on cuda; on cpu only interpreted, for tests, with {INTERPRET_VARIABLE}=1"
    if device_type == "cuda" and interpreted:
        return f"{INTERPRET_VARIABLE}=1 is set, and the interpreter cannot read a GPU's memory"
    return None


@dataclass(frozen=True)
class _Tables:
    """How the segments of a call are cut into chunks, on the device that reads it.

    Attributes:
        chunks: int32 [chunks, 3]: segment, number inside the segment, length in elements; sorted by
            the dtype of the segment.
        bounds: int32 [segments, 2]: the segment's first chunk, and the one after its last.
        launches: Of each dtype: its first chunk, and how many it has.
    """

    chunks: torch.Tensor
    bounds: torch.Tensor
    launches: tuple[tuple[torch.dtype, int, int], ...]


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """See `stats.tensor_stats`. Cost: two launches, one pass; a copy if not contiguous."""
    flat = _aligned(flat)
    if layout is None:
        tables = _cached_tables((flat.numel(),), (flat.dtype,), flat.device)
        return _launch(flat.data_ptr(), _zero(flat.device), tables, detail)
    tables, starts = layout.table(
        f"triton.{flat.device}.{flat.dtype}",
        lambda offsets: _tables_of_offsets(offsets, flat.dtype, flat.device),
    )
    return _launch(flat.data_ptr(), starts, tables, detail)


def multi_tensor_stats(tensors: Sequence[torch.Tensor], detail: bool) -> torch.Tensor:
    """See `stats.multi_tensor_stats`.

    Cost: a launch a dtype and one more, one pass, and a copy of 8 bytes a tensor to the device.
    """
    tensors = [_aligned(tensor) for tensor in tensors]
    device = tensors[0].device
    sizes = tuple([tensor.numel() for tensor in tensors])
    tables = _cached_tables(sizes, tuple([tensor.dtype for tensor in tensors]), device)
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        # From pinned memory the copy does not wait, and torch keeps the memory until it is done.
        addresses = addresses.pin_memory().to(device, non_blocking=True)
    return _launch(0, addresses, tables, detail)


def _launch(base: int, starts: torch.Tensor, tables: _Tables, detail: bool) -> torch.Tensor:
    """Returns the records of the segments that begin at the addresses `base + starts[i]`."""
    module = _loaded()
    device = tables.bounds.device
    segments = tables.bounds.shape[0]
    records = torch.empty((segments, _WORDS), dtype=torch.int64, device=device)
    partials = torch.empty((tables.chunks.shape[0], _WORDS), dtype=torch.int64, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for dtype, first_chunk, chunks in tables.launches:
            module.chunk_kernel[(chunks,)](
                base,
                starts,
                tables.chunks,
                partials,
                first_chunk,
                DETAIL=detail,
                **_constants(dtype),
                **_OPTIONS,
            )
        if segments > 0:
            module.combine_kernel[(segments,)](partials, tables.bounds, records, BLOCK=_COMBINE_BLOCK, **_OPTIONS)
    return records


@functools.cache
def _constants(dtype: torch.dtype) -> dict[str, Any]:
    """What `chunk_kernel` is compiled for."""
    import triton.language as tl

    spec = FORMATS[dtype]
    low, high = _SAFE.get(dtype, (0, spec.infinity))
    return {
        "BITS": {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[dtype.itemsize],
        "EXPONENT": spec.exponent,
        "MANTISSA": spec.mantissa,
        "INFINITY": spec.infinity,
        "HAS_INF": spec.has_inf,
        "SAFE_LOW": low,
        "SAFE_HIGH": high,
        "CHUNK": _CHUNK,
        "BLOCK": _BLOCK[dtype.itemsize],
        "UNROLL": _UNROLL,
        "RESCAN_BLOCK": _RESCAN_BLOCK,
    }


def _tables(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> _Tables:
    order = sorted(range(len(sizes)), key=lambda segment: str(dtypes[segment]))
    segments = torch.tensor(order, dtype=torch.int64, device="cpu")
    lengths = torch.tensor(sizes, dtype=torch.int64, device="cpu")[segments]
    counts = (lengths + _CHUNK - 1) // _CHUNK
    ends = counts.cumsum(0)
    starts = ends - counts

    row = torch.repeat_interleave(counts)  # of each chunk, the position of its segment in `order`
    number = torch.arange(row.numel(), device="cpu") - starts[row]
    length = (lengths[row] - number * _CHUNK).clamp(max=_CHUNK)
    chunks = torch.stack([segments[row], number, length], dim=1)
    bounds = torch.empty((len(sizes), 2), dtype=torch.int64, device="cpu")
    bounds[segments] = torch.stack([starts, ends], dim=1)

    launches = []
    first_chunk = 0
    for dtype, group in itertools.groupby(order, key=lambda segment: dtypes[segment]):
        n_chunks = sum(-(-sizes[segment] // _CHUNK) for segment in group)
        if n_chunks > 0:
            launches.append((dtype, first_chunk, n_chunks))
        first_chunk += n_chunks
    return _Tables(chunks.to(device, torch.int32), bounds.to(device, torch.int32), tuple(launches))


# Gradients keep their sizes from step to step, not their addresses.
_cached_tables = functools.lru_cache(maxsize=16)(_tables)


def _tables_of_offsets(offsets: list[int], dtype: torch.dtype, device: torch.device) -> tuple[_Tables, torch.Tensor]:
    """The tables of a layout, and where its segments begin, in bytes."""
    sizes = tuple([end - begin for begin, end in itertools.pairwise(offsets)])
    starts = [begin * dtype.itemsize for begin in offsets[:-1]]
    tables = _tables(sizes, (dtype,) * len(sizes), device)
    return tables, torch.tensor(starts, dtype=torch.int64, device=device)


@functools.cache
def _zero(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous, and at an address that its element size divides."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _loaded() -> ModuleType:
    module = kernels()
    if module is None:
        raise BackendUnavailable(f"the triton backend cannot run: {unavailable('cuda')}")
    return module
