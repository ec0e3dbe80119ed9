"""What a measurement is made on."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from datetime import datetime, timezone

from cuda_runtime import CudaRuntime

from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM_THRESHOLD = 2**31 - 1
_MMAP_THRESHOLD = 32 << 20  # the largest that glibc takes


def keep_freed_memory() -> bool:
    """Makes the allocator keep what is freed, and returns whether it does.

    By default glibc gives memory back to the system or not, depending on all that was allocated
    before. A candidate with temporaries of a few MiB then takes up to 20 times as long in one round
    as in the next, for page faults. Temporaries beyond 32 MiB always cost them.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def prepare(device: str = "cpu") -> dict[str, str]:
    """Returns what is known of the machine that a step runs on, by name.

    Ends the script with exit code 2 where there is no kernel to measure.
    """
    runtime = CudaRuntime()
    reason = native.unavailable("cpu") if device == "cpu" else runtime.unavailable()
    if reason is not None:
        print(f"Error: there is nothing to measure: {reason}", file=sys.stderr)
        sys.exit(2)
    if device == "cpu":
        return describe_cpu()
    return describe_gpu(runtime.describe(), getattr(dispatch.backend_for(device), "__name__", "unknown"))


def describe_cpu() -> dict[str, str]:
    """Returns what is known of this machine and of the software, by name."""
    return {
        **_processor(),
        "cores": str(os.cpu_count()),
        "instruction set": native.isas()[native.isa()],
        **_software("torch", "deepspeed"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        **_moment(),
    }


def describe_gpu(gpu: dict[str, str], backend: str) -> dict[str, str]:
    """Returns what is known of a GPU, of its host and of the software, by name.

    Args:
        gpu: What the GPU says of itself.
        backend: Module that the public calls go to.
    """
    return {
        **gpu,
        "host cpu": _processor()["cpu"],
        "backend of the public calls": backend,
        **_software("torch", "triton", "deepspeed", "apex", "transformer-engine"),
        **_moment(),
    }


def _processor() -> dict[str, str]:
    """Model and caches. A virtual machine often hides the model's name; its numbers still tell which one it is."""
    import cpuinfo  # type: ignore[import-untyped, unused-ignore]

    facts = cpuinfo.get_cpu_info()
    name = facts.get("brand_raw", platform.machine())
    numbers = f" (family {facts['family']}, model {facts.get('model', '?')})" if "family" in facts else ""
    caches = {"L1": "l1_data_cache_size", "L2": "l2_cache_size", "L3": "l3_cache_size"}
    sizes = [f"{level} {facts[key]}" for level, key in caches.items() if key in facts]
    return {"cpu": f"{name}{numbers}", "caches in bytes": ", ".join(sizes) or "unknown"}


def _software(*distributions: str) -> dict[str, str]:
    versions = {name: _version(name) for name in (*distributions, "hallo-numguard")}
    return {"python": platform.python_version(), **versions}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _moment() -> dict[str, str]:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "load average": load}
