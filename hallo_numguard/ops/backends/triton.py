"""The launches of the Triton kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.ops import device as runtime
from hallo_numguard.ops.backends.chunks import CHUNK, Chunks, chunks_of_layout, chunks_of_list, chunks_of_one
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.tensor_list import TensorList, aligned

INTERPRET_VARIABLE = "TRITON_INTERPRET"

# Sizes are in elements. A block is two loads of 16 bytes for each of 128 threads (one, if elements are a byte), and
# adds at most 33 squares to a float32 sum, which costs 1e-6 of the norm at worst. Which elements meet in one sum, and
# so the result, depends on the three block sizes: csrc/cuda/kernels.cuh has the same numbers.
_BLOCK = {1: 2048, 2: 2048, 4: 1024, 8: 512}
_RESCAN_BLOCK = 512
_COMBINE_BLOCK = 128
_UNROLL = {1: 4, 2: 2, 4: 2, 8: 1}  # four loads of 16 bytes in flight a thread; doubles are unrolled by the compiler
# Products are not fused into additions, so that results are the same bits wherever the kernels run.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# float32 holds the squares of a chunk whose largest magnitude lies between: they stay below 2^120, and what underflows
# is below 2^-34 of the chunk. Those of narrower formats always fit.
_SAFE = {torch.float32: (2.0**-50, 2.0**60), torch.bfloat16: (2.0**-50, 2.0**60)}
# float8_e4m3fn is read as if it were float16, whose bias is 8 larger; there NaN is the number after its largest.
_SCALE = {torch.float8_e4m3fn: 256.0}
_NUMBER_LIMIT = {torch.float8_e4m3fn: 480.0 / 256.0}


@functools.cache
def kernels() -> ModuleType | None:
    """Returns the module of the kernels; None if Triton is not installed."""
    try:
        from hallo_numguard.ops.backends import triton_kernels
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
    if device_type == "cuda" and not runtime.has_gpu():
        return "torch sees no GPU"
    return None


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """Runs `api.tensor_stats`. Cost: at most two launches, one pass; a copy if not contiguous."""
    flat = aligned(flat)
    if layout is None:
        return _launch(
            flat.data_ptr(), _zero(flat.device), chunks_of_one(flat.numel(), flat.dtype, flat.device), detail
        )
    chunks, starts = chunks_of_layout(layout, flat.dtype, flat.device)
    return _launch(flat.data_ptr(), starts, chunks, detail)


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """Runs `api.multi_tensor_stats`.

    Cost: one launch per dtype and one more if any tensor has several chunks; one pass; a copy of 8 bytes per tensor
    to the device, without a host sync.
    """
    chunks = chunks_of_list(tensors.sizes, tensors.dtypes, tensors.device)
    return _launch(0, runtime.send(tensors.addresses, tensors.device), chunks, detail)


def _launch(base: int, starts: torch.Tensor, chunks: Chunks, detail: bool) -> torch.Tensor:
    """Returns the records of the segments that begin at the addresses `base + starts[i]`."""
    module = _loaded()
    records = chunks.buffer()
    with runtime.current(records.device):
        for dtype, first_chunk, count in chunks.launches:
            module.chunk_kernel[(count,)](
                base, starts, chunks.table, records, first_chunk, DETAIL=detail, **constants(dtype), **OPTIONS
            )
        if len(chunks.splits) > 0:
            module.combine_kernel[(len(chunks.splits),)](chunks.splits, records, BLOCK=_COMBINE_BLOCK, **OPTIONS)
    return records[: chunks.segments]


@functools.cache
def constants(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of `chunk_kernel`, except for `DETAIL`."""
    import triton.language as tl

    spec = FORMATS[dtype]
    low, high = _SAFE.get(dtype, (0.0, _NUMBER_LIMIT.get(dtype, float("inf"))))
    return {
        "BITS": {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[dtype.itemsize],
        "EXPONENT": spec.exponent,
        "MANTISSA": spec.mantissa,
        "INFINITY": spec.infinity,
        "HAS_INF": spec.has_inf,
        "SAFE_LOW": low,
        "SAFE_HIGH": high,
        "SCALE": _SCALE.get(dtype, 1.0),
        "CHUNK": CHUNK,
        "BLOCK": _BLOCK[dtype.itemsize],
        "UNROLL": _UNROLL[dtype.itemsize],
        "RESCAN_BLOCK": _RESCAN_BLOCK,
    }


@functools.cache
def _zero(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def _loaded() -> ModuleType:
    module = kernels()
    if module is None:
        raise BackendUnavailable(f"the triton backend cannot run: {unavailable('cuda')}")
    return module
