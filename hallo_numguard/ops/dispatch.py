"""Choice of one backend per device type, made once, with reasons."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Protocol, cast

import torch

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.ops.backends import cpu
from hallo_numguard.ops.backends.cpu import DirectCalls
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.tensor_list import TensorList

BACKEND_VARIABLE = "HALLO_NUMGUARD_BACKEND"
BACKENDS = ("native", "triton", "torch", "reference")

# On a GPU both give the same bits, and are as fast; a call through Triton takes the host twice as long (docs/gpu.md),
# but needs no compiler at installation and compiles for any GPU.
_PREFERENCE = {"cpu": ("native", "torch", "reference"), "cuda": ("native", "triton", "reference")}
_MODULES = {"torch": "torch_operators", "native cpu": "cpu", "native cuda": "cuda"}  # "native" has one per device
_log = logging.getLogger("hallo_numguard")


class Backend(Protocol):
    """Interface of a module in `backends`. Results are packed as in `table.StatsTable`."""

    @staticmethod
    def unavailable(device_type: str) -> str | None:
        """Returns why this backend cannot run on such a device, or None if it can."""

    @staticmethod
    def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
        """Returns one record per segment of `flat`, whose elements count in row-major order."""

    @staticmethod
    def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
        """Returns one record per tensor; dtypes may differ."""


def backend(name: str, device_type: str = "cpu") -> Backend:
    """Returns the backend of that name for such devices, whether it can run or not."""
    module = _MODULES.get(f"{name} {device_type}") or _MODULES.get(name, name)
    return cast(Backend, importlib.import_module(f"hallo_numguard.ops.backends.{module}"))


@functools.cache
def backend_for(device_type: str) -> Backend:
    """Returns the backend for tensors on such devices: the one in HALLO_NUMGUARD_BACKEND, or the fastest that runs.

    Raises:
        BackendUnavailable: If the variable names one that does not exist or cannot run there.
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced:
        return _forced(forced, device_type)
    reasons = {}
    for name in _PREFERENCE.get(device_type, ("reference",)):
        reason = backend(name, device_type).unavailable(device_type)
        if reason is None:
            break
        reasons[name] = reason
    if name in ("torch", "reference"):  # slow, so the log has the reason
        for other in [other for other in BACKENDS if other in reasons]:
            _log.warning("%s: the %s backend is not used: %s", device_type, other, reasons[other])
    return backend(name, device_type)


def runs_natively(device_type: str) -> bool:
    """Returns whether `backend_for` gives the CPU's C++ kernels, which offer more than the other backends."""
    return getattr(backend_for(device_type), "scan_file", None) is not None


@functools.cache
def direct_calls() -> DirectCalls | None:
    """Returns the calls that go from tensors on the CPU to records without a backend; None if there are none.

    Raises:
        BackendUnavailable: If HALLO_NUMGUARD_ISA names an instruction set that this CPU does not run.
    """
    try:
        found = backend_for("cpu")
    except BackendUnavailable:  # the variable names one of another device
        return None
    return cpu.direct_calls() if found is cast(Backend, cpu) else None


def explain(device_type: str) -> dict[str, str | None]:
    """Returns the reason why each backend cannot run on such a device; None for those that can."""
    return {name: backend(name, device_type).unavailable(device_type) for name in BACKENDS}


def _forced(name: str, device_type: str) -> Backend:
    if name not in BACKENDS:
        raise BackendUnavailable(
            f"{BACKEND_VARIABLE}={name}, but there is no such backend; choose one of {', '.join(BACKENDS)}"
        )
    reason = backend(name, device_type).unavailable(device_type)
    if reason is not None:
        raise BackendUnavailable(f"{BACKEND_VARIABLE}={name}, but it cannot run here: {reason}")
    return backend(name, device_type)
