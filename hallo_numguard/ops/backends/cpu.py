"""The C++ kernels on the CPU: instruction sets, threads, and calls."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.core.records import RECORD_FIELDS
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.native_extension import extension, why_missing
from hallo_numguard.ops.tensor_list import TensorList

ISA_VARIABLE = "HALLO_NUMGUARD_ISA"

_CODES = {dtype: spec.code for dtype, spec in FORMATS.items()}
_WORDS = len(RECORD_FIELDS)
_local = threading.local()


def unavailable(device_type: str) -> str | None:
    """Returns why this backend cannot run on such a device, or None if it can."""
    if device_type != "cpu":
        return f"runs on cpu, not on {device_type}"
    missing = why_missing()
    if missing is not None:
        return (
            f"there is no extension, for {missing}: install a C++ compiler, then reinstall "
            "with HALLO_NUMGUARD_BUILD_NATIVE=1 to see what fails"
        )
    return None


def isas() -> list[str]:
    """Returns the instruction sets that this CPU runs, and the choices of kernels that some CPUs have."""
    module = extension()
    return [] if module is None else list(module.isas())


@functools.cache
def isa() -> int:
    """Returns the number of the instruction set in use: that of HALLO_NUMGUARD_ISA, or the fastest on this CPU.

    Raises:
        BackendUnavailable: If the variable names an instruction set that this CPU does not run.
    """
    available = isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return int(_loaded().fastest_isa())
    if wanted not in available:
        raise BackendUnavailable(f"{ISA_VARIABLE}={wanted}, but this CPU runs {', '.join(available)}")
    return available.index(wanted)


def stay_on_this_thread() -> None:
    """Makes scans from this thread run on it alone: for threads that share out the work themselves."""
    _local.threads = 1
    if (module := extension()) is not None:
        module.stay_on_this_thread()


def _threads() -> int:
    return getattr(_local, "threads", None) or torch.get_num_threads()


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """Runs `api.tensor_stats`. Cost: one pass, one allocation of 64 bytes per segment; a copy if not contiguous."""
    module = _loaded()
    flat = flat.contiguous()
    options = (_CODES[flat.dtype], detail, isa(), _threads())
    if layout is None:
        packed = torch.empty((1, _WORDS), dtype=torch.int64, device="cpu")
        module.scan_one(packed.data_ptr(), flat.data_ptr(), flat.numel(), *options)
    else:
        packed = torch.empty((layout.segments, _WORDS), dtype=torch.int64, device="cpu")
        plan = layout.table("native", module.Plan)
        module.scan_flat(packed.data_ptr(), flat.data_ptr(), plan, *options)
    return packed


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """Runs `api.multi_tensor_stats`. Cost: one pass per dtype."""
    module = _loaded()
    packed = torch.empty((len(tensors), _WORDS), dtype=torch.int64, device="cpu")
    first = tensors.dtypes[0]
    if tensors.dtypes.count(first) == len(tensors):
        _scan_list(module, packed, tensors.addresses, tensors.sizes, first, detail)
        return packed
    addresses, sizes = memoryview(tensors.addresses).cast("Q"), memoryview(tensors.sizes).cast("q")
    for dtype in set(tensors.dtypes):
        rows = [row for row, code in enumerate(tensors.dtypes) if code == dtype]
        part = torch.empty((len(rows), _WORDS), dtype=torch.int64, device="cpu")
        some_addresses = array("Q", [addresses[row] for row in rows]).tobytes()
        some_sizes = array("q", [sizes[row] for row in rows]).tobytes()
        _scan_list(module, part, some_addresses, some_sizes, dtype, detail)
        packed[rows] = part
    return packed


@dataclass(frozen=True)
class DirectCalls:
    """C functions that read torch's tensors by themselves, and allocate the records: 2 us on the host.

    Attributes:
        scan_tensor: Does what `tensor_stats` does. Takes the tensor, a `Plan` or None, `detail` and `isa`; returns None
            unless the tensor is dense and contiguous, on the CPU, no subclass, of a known dtype, and has all elements
            of the plan.
        scan_tensors: Does what `multi_tensor_stats` does. Takes a list or tuple, `detail` and `isa`; returns None
            unless there is a tensor, and all are such.
        Plan: Makes a plan of a list of offsets.
        isa: Number of the instruction set.
    """

    scan_tensor: Callable[[torch.Tensor, Any, bool, int], torch.Tensor | None]
    scan_tensors: Callable[[Sequence[torch.Tensor], bool, int], torch.Tensor | None]
    Plan: Callable[[list[int]], Any]
    isa: int


def direct_calls() -> DirectCalls | None:
    """Returns these functions; None before torch 2.10, whose tensors C code cannot read, or without the extension."""
    module, exchange = extension(), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or exchange is None:
        return None
    if not module.prepare(exchange, torch.Tensor, torch.nn.Parameter, torch.get_num_threads):
        return None
    return DirectCalls(module.scan_tensor, module.scan_tensors, module.Plan, isa())


def scan_file(
    descriptor: int, begin: int, end: int, runs: Sequence[tuple[int, int, torch.dtype]], words: torch.Tensor
) -> torch.Tensor:
    """Reads bytes of a file block by block, and scans each while it is in the cache, on the calling thread alone.

    Args:
        descriptor: File descriptor.
        begin: First byte; a multiple of 4096.
        end: Byte after the last.
        runs: Runs of elements in the file: offset in bytes, number of elements, dtype.
        words: Output, one word per whole page: its first 8 bytes, 1 if these are zeros, 0 if the page is.
            int64 [pages].

    Returns:
        Record of the elements that begin in each run; indices count from the run's first. int64 [runs, 8].

    Raises:
        EOFError: If the file is too short.
        OSError: If the disk fails.
    """
    packed = torch.empty((len(runs), _WORDS), dtype=torch.int64, device="cpu")
    flat = array("q", [word for offset, count, dtype in runs for word in (offset, count, _CODES[dtype])])
    failed = _loaded().scan_file(packed.data_ptr(), words.data_ptr(), descriptor, begin, end, flat.tobytes(), isa())
    if failed > 0:
        raise OSError(failed, os.strerror(failed))
    if failed < 0:
        raise EOFError(f"the file ends before byte {end}")
    return packed


def _loaded() -> ModuleType:
    module = extension()
    if module is None:
        raise BackendUnavailable(f"the native backend cannot run: {unavailable('cpu')}")
    return module


def _scan_list(
    module: ModuleType, packed: torch.Tensor, addresses: bytes, sizes: bytes, dtype: int, detail: bool
) -> None:
    module.scan_list(packed.data_ptr(), addresses, _plan_of_sizes(sizes), dtype, detail, isa(), _threads())


@functools.lru_cache(maxsize=16)
def _plan_of_sizes(sizes: bytes) -> Any:
    """The chunk table of a list of tensors, cached: gradients keep their sizes from step to step."""
    return _loaded().Plan(list(itertools.accumulate(memoryview(sizes).cast("q"), initial=0)))
