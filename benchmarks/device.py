"""The devices that can be measured: what sets the limit there, how calls are timed, what else does the work."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from candidates import Candidate, Made, copies, gpu_backends, memory_reads, native_entry, public
from cuda_runtime import CudaRuntime
from machine import cpu_model, describe_cpu, describe_gpu, keep_freed_memory
from peers import ON_GPU, peers
from problem import Problem, memory_needed
from results import GIB, KIB, MIB, Run, Target
from targets import cpu_targets, gpu_targets
from timing import Clock, EventClock, HostClock, Stream

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native


class Unusable(Exception):
    """Nothing can be measured as asked; the text says why and what to do."""


class Device(ABC):
    """One kind of device.

    Attributes:
        torch_device: Where the buffers are.
        sizes, quick_sizes: Bytes of the buffers, if nobody asks for others.
        limit: What a fraction of 1 stands for.
        time: What the columns of times mean.
    """

    torch_device: torch.device
    sizes: Sequence[int]
    quick_sizes: Sequence[int]
    limit: str
    time: str

    @abstractmethod
    def require(self) -> None:
        """Raises Unusable where the numbers would be those of nothing, or of the slow fallback."""

    @abstractmethod
    def thread_counts(self, asked: Sequence[int], quick: bool) -> Sequence[int | None]:
        """Returns the numbers of threads to measure with, None where it makes no difference.

        Raises:
            Unusable: If some were asked for and it makes no difference.
        """

    @abstractmethod
    def name(self) -> str:
        """Returns what its maker calls it."""

    @abstractmethod
    def prepare(self) -> dict[str, str]:
        """Makes the process ready to measure, and returns what is known of the machine."""

    @abstractmethod
    def no_room(self, size: int, segments: int) -> str | None:
        """Returns why a buffer of that size cannot be measured, or None if it can."""

    @abstractmethod
    def clock(self, problem: Problem) -> Clock:
        """Returns what times calls on the buffer."""

    @abstractmethod
    def limits(self, problem: Problem) -> list[Candidate]:
        """Returns what sets the limit, and hints beside it. The first is what all others are paired with."""

    @abstractmethod
    def ours(self, problem: Problem) -> dict[str, Made]:
        """Returns our own entries."""

    @abstractmethod
    def peers(self, problem: Problem, with_compile: bool) -> dict[str, Made]:
        """Returns what else does the work, or a part of it."""

    @abstractmethod
    def targets(self, run: Run) -> list[Target]:
        """Holds a run against what was promised."""


class Cpu(Device):
    """The CPU, on a number of threads."""

    torch_device = torch.device("cpu")
    sizes = (4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 256 * MIB)
    quick_sizes = (64 * KIB, 4 * MIB)
    limit = "time to read the same memory on as many threads"
    time = "us: microseconds of a call."

    _CACHED = 32 * MIB  # no cache that one core reads alone is much larger

    def require(self) -> None:
        """See `Device`."""
        reason = native.unavailable("cpu")
        if reason is not None:
            raise Unusable(f"there is nothing to measure: {reason}")
        if _backend("cpu") is not dispatch.backend("native", "cpu"):
            raise Unusable(f"{dispatch.BACKEND_VARIABLE} names another backend than native: unset it")

    def thread_counts(self, asked: Sequence[int], quick: bool) -> Sequence[int | None]:
        """See `Device`."""
        return asked or ([1] if quick or (os.cpu_count() or 1) == 1 else [1, 2])

    def name(self) -> str:
        """See `Device`."""
        return cpu_model()

    def prepare(self) -> dict[str, str]:
        """See `Device`. Where the allocator can be told so, it keeps what is freed."""
        kept = keep_freed_memory()
        return describe_cpu() | {"freed memory": "kept by the allocator" if kept else "as the allocator likes"}

    def no_room(self, size: int, segments: int) -> str | None:
        """See `Device`. What the system has free, and what it would swap, is hard to tell."""
        return None

    def clock(self, problem: Problem) -> Clock:
        """See `Device`."""
        return HostClock(warm=problem.bytes <= self._CACHED)

    def limits(self, problem: Problem) -> list[Candidate]:
        """See `Device`."""
        return memory_reads(problem)

    def ours(self, problem: Problem) -> dict[str, Made]:
        """See `Device`."""
        return {candidate.key: candidate for candidate in [native_entry(problem), *public(problem)]}

    def peers(self, problem: Problem, with_compile: bool) -> dict[str, Made]:
        """See `Device`."""
        return peers(problem, with_compile, {})

    def targets(self, run: Run) -> list[Target]:
        """See `Device`."""
        return cpu_targets(run)


class Runtime(Stream, Protocol):
    """What only a GPU can do and tell."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def unavailable(self) -> str | None:
        """Returns why there is no GPU, and what to do, or None if there is one."""

    def free_memory(self) -> int:
        """Returns the bytes that can be allocated."""

    def name(self) -> str:
        """Returns the GPU's name."""

    def describe(self) -> dict[str, str]:
        """Returns what is known of the GPU."""


class Gpu(Device):
    """A GPU, on its current stream."""

    sizes = (64 * KIB, 1 * MIB, 16 * MIB, 256 * MIB, 1 * GIB)
    quick_sizes = (1 * MIB, 256 * MIB)
    limit = "half the time of a device-to-device copy of the same memory"
    time = (
        "us: microseconds that the GPU works on a call, between two events, its L2 cache emptied before, "
        "launches queued ahead. host us: microseconds until the call returns, the GPU idle."
    )

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.torch_device = runtime.device

    def require(self) -> None:
        """See `Device`."""
        reason = self._runtime.unavailable()
        if reason is not None:
            raise Unusable(f"there is no GPU to measure: {reason}. Or measure the CPU, with --device cpu")
        kind = self.torch_device.type
        if _backend(kind) is dispatch.backend("reference", kind):
            reasons = dispatch.explain(kind)
            others = "; ".join(f"{name}: {reasons[name] or 'runs'}" for name in reasons if name != "reference")
            raise Unusable(f"calls would go to the slow fallback ({others}; see {dispatch.BACKEND_VARIABLE})")

    def thread_counts(self, asked: Sequence[int], quick: bool) -> Sequence[int | None]:
        """See `Device`."""
        if asked:
            raise Unusable("--threads makes no difference on a GPU: leave it out")
        return [None]

    def name(self) -> str:
        """See `Device`."""
        return self._runtime.name()

    def prepare(self) -> dict[str, str]:
        """See `Device`."""
        module = getattr(_backend(self.torch_device.type), "__name__", "unknown")
        return describe_gpu(self._runtime.describe(), module)

    def no_room(self, size: int, segments: int) -> str | None:
        """See `Device`."""
        needed, free = memory_needed(size, segments), self._runtime.free_memory()
        if needed <= free:
            return None
        return f"takes about {needed / GIB:.1f} GiB with all temporaries, and {free / GIB:.1f} GiB are free"

    def clock(self, problem: Problem) -> Clock:
        """See `Device`."""
        return EventClock(self._runtime)

    def limits(self, problem: Problem) -> list[Candidate]:
        """See `Device`."""
        return copies(problem)

    def ours(self, problem: Problem) -> dict[str, Made]:
        """See `Device`."""
        return {candidate.key: candidate for candidate in public(problem)} | gpu_backends(problem)

    def peers(self, problem: Problem, with_compile: bool) -> dict[str, Made]:
        """See `Device`."""
        return peers(problem, with_compile, ON_GPU)

    def targets(self, run: Run) -> list[Target]:
        """See `Device`."""
        return gpu_targets(run)


def _backend(device_type: str) -> dispatch.Backend:
    """The backend that the public calls go to."""
    try:
        return dispatch.backend_for(device_type)
    except BackendUnavailable as error:
        raise Unusable(str(error)) from error


DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Gpu(CudaRuntime())}
