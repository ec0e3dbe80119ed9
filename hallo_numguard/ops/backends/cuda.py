"""The launches of the CUDA C++ kernels: the native backend on a GPU."""

from __future__ import annotations

from types import ModuleType

import torch

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.ops import device as runtime
from hallo_numguard.ops.backends.chunks import Chunks, chunks_of_layout, chunks_of_list, chunks_of_one
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.native_extension import cuda_extension as extension
from hallo_numguard.ops.native_extension import why_cuda_missing
from hallo_numguard.ops.tensor_list import TensorList, aligned


def unavailable(device_type: str) -> str | None:
    """Returns why this backend cannot run on such a device, or None if it can."""
    if device_type != "cuda":
        return f"runs on cuda, not on {device_type}"
    module = extension()
    if module is None:
        return (
            f"there is no extension, for {why_cuda_missing()}: install the CUDA toolkit (nvcc), then reinstall "
            "with HALLO_NUMGUARD_CUDA=1 to see what fails"
        )
    if not runtime.has_gpu():
        return "torch sees no GPU"
    return module.unavailable(runtime.current_index()) or None


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """Runs `api.tensor_stats`. Cost: at most two launches, one pass; a copy if not contiguous."""
    flat = aligned(flat)
    if layout is None:
        chunks = chunks_of_one(flat.numel(), flat.dtype, flat.device)
        return _scan_inline(flat.data_ptr().to_bytes(8, "little"), chunks, detail)
    chunks, starts = chunks_of_layout(layout, flat.dtype, flat.device)
    return _scan_table(flat.data_ptr(), starts, chunks, detail)


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """Runs `api.multi_tensor_stats`.

    Cost: one launch per dtype and one more if any tensor has several chunks; one pass. Up to 480 addresses travel as
    arguments of the launch; more are copied to the device, 8 bytes per tensor, without a host sync.
    """
    chunks = chunks_of_list(tensors.sizes, tensors.dtypes, tensors.device)
    if len(tensors) <= _loaded().INLINE_CAPACITY:
        return _scan_inline(tensors.addresses, chunks, detail)
    return _scan_table(0, runtime.send(tensors.addresses, tensors.device), chunks, detail)


def _scan_inline(addresses: bytes, chunks: Chunks, detail: bool) -> torch.Tensor:
    records = chunks.buffer()
    stream = runtime.stream_of(records.device)
    _loaded().scan_inline(records.device.index, stream, chunks.pointers, addresses, detail, records.data_ptr())
    return records[: chunks.segments]


def _scan_table(base: int, starts: torch.Tensor, chunks: Chunks, detail: bool) -> torch.Tensor:
    records = chunks.buffer()
    stream = runtime.stream_of(records.device)
    _loaded().scan_table(
        records.device.index, stream, chunks.pointers, base, starts.data_ptr(), detail, records.data_ptr()
    )
    return records[: chunks.segments]


def _loaded() -> ModuleType:
    module = extension()
    if module is None:
        raise BackendUnavailable(f"the native backend cannot run: {unavailable('cuda')}")
    return module
