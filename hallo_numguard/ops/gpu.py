"""Which of the two GPU backends a call goes to, where both are there: they give the same bits.

Host time of a call on 200 segments, without the driver's own launches (Zen 5, Python 3.11): 13 microseconds for Triton
3.9, 2.7 for the CUDA extension. A pass over 32 MiB takes an H100 about 10: above, the GPU is busy while the host
launches, and Triton's compiler is the one that is made for the GPU at hand. Below, the launch is what one waits for.
"""

from __future__ import annotations

import functools

import torch

from hallo_numguard.ops import cuda, triton
from hallo_numguard.ops.dispatch import Backend, backend
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.tensor_list import TensorList

LAUNCH_BOUND = 32 << 20  # bytes

_ITEM_SIZES = [dtype.itemsize for dtype in FORMATS]


def unavailable(device_type: str) -> str | None:
    """Returns why there is no choice, or None if both backends run."""
    return cuda.unavailable(device_type) or triton.unavailable(device_type)


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """See `stats.tensor_stats`."""
    return choice(flat.nbytes).tensor_stats(flat, layout, detail)


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """See `stats.multi_tensor_stats`."""
    return choice(_bytes_of(tensors.sizes, tensors.dtypes)).multi_tensor_stats(tensors, detail)


def choice(nbytes: int) -> Backend:
    """Returns the backend for a call that reads so many bytes."""
    return backend("native", "cuda") if nbytes < LAUNCH_BOUND else backend("triton", "cuda")


@functools.lru_cache(maxsize=16)
def _bytes_of(sizes: bytes, dtypes: bytes) -> int:
    return sum(size * _ITEM_SIZES[code] for size, code in zip(memoryview(sizes).cast("q"), dtypes, strict=True))
