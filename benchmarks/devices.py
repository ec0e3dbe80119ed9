"""The devices that can be measured: what sets the limit there, how calls are timed, and the candidates."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from candidates import GPU_PEERS, Candidate, Candidates, copies, gpu_backends, memory_reads, native_entry, peers, public
from cuda_runtime import CudaRuntime
from figures import Run, Target, cpu_targets, gpu_targets
from machine import describe_cpu, describe_gpu, keep_freed_memory
from output import GIB, KIB, MIB
from problems import Problem, memory_needed
from timing import Clock, OwnCore, event_clock, host_clock

from hallo_numguard.core.errors import BackendUnavailable
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.native_extension import extension

_MAX_CACHED_BYTES = 32 * MIB  # no cache that one core reads alone is much larger


class Unusable(Exception):
    """Nothing can be measured as asked; the text says why and what to do."""


class Device:
    """What is measured: the CPU; a GPU replaces what differs.

    Attributes:
        fact: Name of the fact about the machine that says which device it is.
        torch_device: Device of the buffers.
        sizes: Default sizes of the buffers, bytes.
        quick_sizes: Default sizes of a quick run, bytes.
        limit: What a fraction of 1 stands for.
        time: What the columns of times mean.
    """

    fact = "cpu"
    torch_device = torch.device("cpu")
    sizes: Sequence[int] = (4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 256 * MIB)
    quick_sizes: Sequence[int] = (64 * KIB, 4 * MIB)
    limit = "time to read the same memory on as many threads"
    time = "us: microseconds of a call."

    def require(self) -> None:
        """Raises Unusable where the numbers would be those of nothing, or of the slow fallback."""
        reason = native.unavailable("cpu")
        if reason is not None:
            raise Unusable(f"there is nothing to measure: {reason}")
        if _backend("cpu") is not dispatch.backend("native", "cpu"):
            raise Unusable(f"{dispatch.BACKEND_VARIABLE} names another backend than native: unset it")

    def thread_counts(self, asked: Sequence[int], quick: bool) -> Sequence[int | None]:
        """Returns the numbers of threads to measure with, None where it makes no difference.

        Raises:
            Unusable: If some were asked for and it makes no difference.
        """
        return asked or ([1] if quick or (os.cpu_count() or 1) == 1 else [1, 2])

    def prepare(self) -> dict[str, str]:
        """Makes the process ready to measure, and returns what is known of the machine."""
        kept = keep_freed_memory()
        return describe_cpu() | {"freed memory": "kept by the allocator" if kept else "as the allocator likes"}

    def shortage(self, size: int, segments: int) -> str | None:
        """Returns why a buffer of that size does not fit into memory; None if it does, or if that is hard to tell."""
        return None

    def clock(self, problem: Problem) -> Clock:
        """Returns what times calls on the buffer."""
        return host_clock(warm=problem.bytes <= _MAX_CACHED_BYTES)

    def is_undivided(self) -> Callable[[], bool]:
        """Returns what tells whether the host's core is this thread's alone."""
        module = extension()
        return OwnCore(module.core_share if module is not None else lambda: 0.0)

    def limits(self, problem: Problem) -> list[Candidate]:
        """Returns what sets the limit, and hints beside it. The first is what all others are paired with."""
        return memory_reads(problem)

    def candidates(self, problem: Problem, with_compile: bool) -> Candidates:
        """Returns our own calls, and what else does the work or a part of it."""
        entry = native_entry(problem)
        return {entry.key: entry, **public(problem), **peers(problem, with_compile, {})}

    def targets(self, run: Run) -> list[Target]:
        """Compares a run with the targets."""
        return cpu_targets(run)


class _Gpu(Device):
    fact = "gpu"
    sizes = (64 * KIB, 1 * MIB, 16 * MIB, 256 * MIB, 1 * GIB)
    quick_sizes = (1 * MIB, 256 * MIB)
    limit = "half the time of a device-to-device copy of the same memory"
    time = (
        "us: microseconds that the GPU works on a call, between two events, its L2 cache emptied before, "
        "launches queued ahead. host us: microseconds until the call returns, the GPU idle."
    )

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.torch_device = runtime.device

    def require(self) -> None:
        reason = self._runtime.unavailable()
        if reason is not None:
            raise Unusable(f"there is no GPU to measure: {reason}. Or measure the CPU, with --device cpu")
        kind = self.torch_device.type
        if _backend(kind) is dispatch.backend("reference", kind):
            reasons = dispatch.explain(kind)
            others = "; ".join(f"{name}: {reasons[name] or 'runs'}" for name in reasons if name != "reference")
            raise Unusable(f"calls would go to the slow fallback ({others}; see {dispatch.BACKEND_VARIABLE})")

    def thread_counts(self, asked: Sequence[int], quick: bool) -> Sequence[int | None]:
        if asked:
            raise Unusable("--threads makes no difference on a GPU: leave it out")
        return [None]

    def prepare(self) -> dict[str, str]:
        module = getattr(_backend(self.torch_device.type), "__name__", "unknown")
        return describe_gpu(self._runtime.describe(), module)

    def shortage(self, size: int, segments: int) -> str | None:
        needed, free = memory_needed(size, segments), self._runtime.free_memory()
        if needed <= free:
            return None
        return f"takes about {needed / GIB:.1f} GiB with all temporaries, and {free / GIB:.1f} GiB are free"

    def clock(self, problem: Problem) -> Clock:
        return event_clock(self._runtime)

    def limits(self, problem: Problem) -> list[Candidate]:
        return copies(problem)

    def candidates(self, problem: Problem, with_compile: bool) -> Candidates:
        return {**public(problem), **gpu_backends(problem), **peers(problem, with_compile, GPU_PEERS)}

    def targets(self, run: Run) -> list[Target]:
        return gpu_targets(run)


def gpu(runtime: CudaRuntime) -> Device:
    """Returns a GPU, on its current stream."""
    return _Gpu(runtime)


def _backend(device_type: str) -> dispatch.Backend:
    """The backend that the public calls go to."""
    try:
        return dispatch.backend_for(device_type)
    except BackendUnavailable as error:
        raise Unusable(str(error)) from error


DEVICES: dict[str, Device] = {"cpu": Device(), "cuda": gpu(CudaRuntime())}
