"""The two public functions of this package: `tensor_stats` and `multi_tensor_stats`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch.compiler import is_dynamo_compiling

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.ops import tensor_list
from hallo_numguard.ops.device import send
from hallo_numguard.ops.dispatch import backend_for, direct_calls
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.schema import multi_tensor_stats_op, tensor_stats_op
from hallo_numguard.ops.table import StatsTable
from hallo_numguard.ops.tensor_list import TensorList


def tensor_stats(
    flat: torch.Tensor,
    offsets: Layout | Sequence[int] | torch.Tensor | None = None,
    detail: bool = False,
) -> StatsTable:
    """Counts the non-finite elements in every segment of `flat`, and measures the finite ones, in one pass.

    Args:
        flat: Tensor of any shape, of float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2. Its elements
            count in row-major order. One that is not contiguous is copied first.
        offsets: Boundaries of the segments, in elements. Default: the whole tensor is one segment. Make one `Layout`
            if the same offsets are used repeatedly.
        detail: Also count zeros and subnormals. Free where memory is the limit, up to 1.6 times slower in cache.

    Returns:
        A table of one record per segment, on the device of `flat`.

    Raises:
        InvalidInput: If the dtype, the memory layout or the offsets are not supported.

    Cost: every byte is read once; one allocation of 64 bytes per segment; no host synchronisation; on the CPU 3 us on
    the host for a plain tensor (no subclass) that is contiguous, with torch >= 2.10, else about 9.
    """
    if (offsets is None or type(offsets) is Layout) and _is_eager():
        direct = direct_calls()  # an operator costs 3 us, and as much again where its code is not in the cache
        if direct is not None:
            plan = None if offsets is None else offsets.table("native", direct.Plan)
            packed = direct.scan_tensor(flat, plan, detail, direct.isa)
            if packed is not None:
                return StatsTable(packed, detail)
    check_has_data(flat)
    if offsets is None or isinstance(offsets, torch.Tensor):
        where = offsets
    else:
        where = (offsets if isinstance(offsets, Layout) else Layout(offsets)).offsets
    return StatsTable(tensor_stats_op(flat, where, detail), detail)


def multi_tensor_stats(tensors: Sequence[torch.Tensor], detail: bool = False) -> StatsTable:
    """Does the same as `tensor_stats` for separate tensors: one record each.

    Args:
        tensors: Tensors of any shapes; dtypes, strides and devices may differ.
        detail: Also count zeros and subnormals.

    Returns:
        A table of one record per tensor, on the device of the first (on the CPU if there are none).

    Raises:
        InvalidInput: As in `tensor_stats`, with the position in the list.

    Cost: every byte is read once; one pass per device and dtype; 40 to 70 ns per tensor on the host if all are plain
    tensors (no subclass) on one device, dense and contiguous, with torch >= 2.10, else about 1 us.
    """
    tensors = tensors if isinstance(tensors, list) else list(tensors)
    if _is_eager():
        direct = direct_calls()
        packed = None if direct is None else direct.scan_tensors(tensors, detail, direct.isa)
        if packed is not None:
            return StatsTable(packed, detail)
        plain = tensor_list.read_plain(tensors)
        if plain is not None:  # to the backend at once: an operator costs 500 ns per tensor
            return tensor_list_stats(plain, detail)
    devices = set()
    for position, tensor in enumerate(tensors):
        check_has_data(tensor, f" at position {position}")
        devices.add(tensor.device)
    if len(devices) <= 1:
        return StatsTable(multi_tensor_stats_op(tensors, detail), detail)
    return StatsTable(_gather(tensors, sorted(devices, key=str), detail), detail)


def tensor_list_stats(tensors: TensorList, detail: bool = False) -> StatsTable:
    """Does the same as `multi_tensor_stats` for a list that was read already, whose sizes the caller has looked at."""
    return StatsTable(backend_for(tensors.device.type).multi_tensor_stats(tensors, detail), detail)


def _gather(tensors: list[torch.Tensor], devices: list[torch.device], detail: bool) -> torch.Tensor:
    """Records of tensors on several devices, in the tensors' order, on the device of the first."""
    home = tensors[0].device
    rows: list[int] = []
    parts = []
    for device in devices:
        of_device = [row for row, tensor in enumerate(tensors) if tensor.device == device]
        part = multi_tensor_stats_op([tensors[row] for row in of_device], detail)
        parts.append(part.to(home, non_blocking=home.type != "cpu"))  # a copy to the CPU must be waited for
        rows += of_device
    place = sorted(range(len(rows)), key=rows.__getitem__)
    return torch.cat(parts).index_select(0, send(array("q", place).tobytes(), home))


def _is_eager() -> bool:
    """Whether operators are neither traced nor intercepted."""
    return not (is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing())


def check_has_data(tensor: torch.Tensor, where: str = "") -> None:
    """Raises InvalidInput unless `tensor` is a tensor with memory behind it."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInput(f"expected a tensor{where}, got {type(tensor).__name__}")
    if tensor.is_meta:
        raise InvalidInput(f"expected a tensor with data{where}, got one on the meta device")
    if tensor.is_nested:
        raise InvalidInput(f"expected a dense tensor{where}, got a nested one; pass its components instead")
