"""The C++ kernels on the CPU: which instruction set, how many threads, and the calls."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from hallo_numguard.errors import BackendUnavailable
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.records import RECORD_FIELDS

ISA_VARIABLE = "HALLO_NUMGUARD_ISA"

_CODES = {dtype: spec.code for dtype, spec in FORMATS.items()}
_WORDS = len(RECORD_FIELDS)


@functools.cache
def extension() -> ModuleType | None:
    """Returns the extension module, or None if this installation has none."""
    try:
        from hallo_numguard import _native
    except ImportError:
        return None
    return _native


def unavailable(device_type: str) -> str | None:
    """Returns why this backend cannot run on such a device, or None if it can."""
    if device_type != "cpu":
        return f"runs on cpu, not on {device_type}"
    if extension() is None:
        return (
            "the extension was not built: install a C++ compiler, then reinstall "
            "with HALLO_NUMGUARD_BUILD_NATIVE=1 to see what fails"
        )
    return None


def isas() -> list[str]:
    """Returns the instruction sets that this CPU runs, slowest first."""
    module = extension()
    return [] if module is None else list(module.isas())


@functools.cache
def isa() -> int:
    """Returns the number of the instruction set in use: HALLO_NUMGUARD_ISA, or the fastest.

    Raises:
        BackendUnavailable: If the variable names one that this CPU does not run.
    """
    available = isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return len(available) - 1
    if wanted not in available:
        raise BackendUnavailable(f"{ISA_VARIABLE}={wanted}, but this CPU runs {', '.join(available)}")
    return available.index(wanted)


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """See `stats.tensor_stats`. Cost: one pass, one allocation of 64 bytes a segment; a copy if not contiguous."""
    module = _loaded()
    flat = flat.contiguous()
    options = (_CODES[flat.dtype], detail, isa(), torch.get_num_threads())
    if layout is None:
        packed = torch.empty((1, _WORDS), dtype=torch.int64, device="cpu")
        module.scan_one(packed.data_ptr(), flat.data_ptr(), flat.numel(), *options)
    else:
        packed = torch.empty((layout.segments, _WORDS), dtype=torch.int64, device="cpu")
        plan = layout.table("native", module.Plan)
        module.scan_flat(packed.data_ptr(), flat.data_ptr(), plan, *options)
    return packed


def multi_tensor_stats(tensors: Sequence[torch.Tensor], detail: bool) -> torch.Tensor:
    """See `stats.multi_tensor_stats`. Cost: one pass a dtype; a copy of each tensor that is not contiguous."""
    module = _loaded()
    tensors = [tensor.contiguous() for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return _scan_list(module, tensors, detail)
    packed = torch.empty((len(tensors), _WORDS), dtype=torch.int64, device="cpu")
    for dtype in dtypes:
        rows = [row for row, tensor in enumerate(tensors) if tensor.dtype == dtype]
        packed[rows] = _scan_list(module, [tensors[row] for row in rows], detail)
    return packed


def _loaded() -> ModuleType:
    module = extension()
    if module is None:
        raise BackendUnavailable(f"the native backend cannot run: {unavailable('cpu')}")
    return module


def _scan_list(module: ModuleType, tensors: list[torch.Tensor], detail: bool) -> torch.Tensor:
    packed = torch.empty((len(tensors), _WORDS), dtype=torch.int64, device="cpu")
    plan = _plan_of_sizes(tuple([tensor.numel() for tensor in tensors]))
    addresses = [tensor.data_ptr() for tensor in tensors]
    options = (_CODES[tensors[0].dtype], detail, isa(), torch.get_num_threads())
    module.scan_list(packed.data_ptr(), addresses, plan, *options)
    return packed


@functools.lru_cache(maxsize=16)
def _plan_of_sizes(sizes: tuple[int, ...]) -> Any:
    """The chunk table of a list of tensors: gradients keep their sizes from step to step, not their addresses."""
    return _loaded().Plan(list(itertools.accumulate(sizes, initial=0)))
