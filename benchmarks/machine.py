"""What a measurement is made on."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

from hallo_numguard.ops.backends import cpu as native

_CPU_INFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM_THRESHOLD = 2**31 - 1
_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes


def keep_freed_memory() -> bool:
    """Makes the allocator keep what is freed, and tells whether it does.

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


def describe_cpu() -> dict[str, str]:
    """Returns what is known of this machine and of the software, ready to be printed."""
    return _known(
        {
            "cpu": cpu_model(),
            "cores": str(os.cpu_count()),
            "caches": _caches(),
            "instruction set": native.isas()[native.isa()],
            **_software("torch", "deepspeed"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
            **_moment(),
        }
    )


def require_native() -> None:
    """Ends the script with exit code 2 if there is no native extension to measure."""
    reason = native.unavailable("cpu")
    if reason is not None:
        print(f"Error: there is nothing to measure: {reason}", file=sys.stderr)
        sys.exit(2)


def describe_gpu(gpu: dict[str, str], backend: str) -> dict[str, str]:
    """Returns what is known of a GPU, of what launches on it, and of the software, ready to be printed.

    Args:
        gpu: What the GPU says of itself.
        backend: The module that the public calls go to.
    """
    return _known(
        {
            **gpu,
            "host cpu": cpu_model(),
            "backend of the public calls": backend,
            **_software("torch", "triton", "deepspeed", "apex", "transformer-engine"),
            **_moment(),
        }
    )


def _known(facts: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value}


def _software(*distributions: str) -> dict[str, str]:
    names = (*distributions, "hallo-numguard")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _moment() -> dict[str, str]:
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "load average": _load()}


def cpu_model() -> str:
    """Returns the name of the CPU, or the architecture where the system does not say."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return f"{value.strip()}{_family()}"
    return platform.processor() or platform.machine()


def _family() -> str:
    """A virtual machine often hides the model's name; the numbers still tell which one it is."""
    numbers: dict[str, str] = {}
    for line in _CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        numbers.setdefault(name.strip(), value.strip())
    if "cpu family" not in numbers:
        return ""
    return f" (family {numbers['cpu family']}, model {numbers.get('model', '?')})"


def _caches() -> str:
    """Such as "L1 48K, L2 1024K, L3 32768K"; empty where the system does not say."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return ""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
