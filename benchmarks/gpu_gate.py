"""What the machine code of a kernel must not do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpu_binaries import HipFigures
from gpu_figures import WARP, Figures, Variant
from gpu_roofline import bytes_in_flight, device_of, resident_warps

WIDTH = 16  # bytes that a load of the main loop moves at least, a thread

# Registers of a thread, at most, by backend, kernel, bytes of an element and detail. Each is a step of the occupancy
# above what the compilers take now, on the architecture where they take most: docs/gpu.md has the warps. nvcc is told
# to keep to 56 by __launch_bounds__, so there is no slack in that.
BUDGETS = {
    ("triton", "chunk", 1, False): 96,
    ("triton", "chunk", 2, False): 64,
    ("triton", "chunk", 4, False): 64,
    ("triton", "chunk", 8, False): 80,
    ("triton", "chunk", 1, True): 128,
    ("triton", "chunk", 2, True): 128,
    ("triton", "chunk", 4, True): 80,
    ("triton", "chunk", 8, True): 96,
    ("triton", "combine", 0, False): 64,
    **{("cuda", "chunk", item_size, detail): 56 for item_size in (1, 2, 4, 8) for detail in (False, True)},
    ("cuda", "combine", 0, False): 48,
}


def budget_of(variant: Variant) -> int:
    """Returns the registers that a kernel may take."""
    return BUDGETS[variant.backend, variant.kernel, variant.item_size, variant.detail]


def budgeted_warps(figures: Figures) -> int:
    """Returns the warps that a multiprocessor holds if a kernel takes all that it may."""
    return resident_warps(figures.arch, replace(figures.resources, registers=budget_of(figures.variant)))


def violations(figures: Figures) -> list[str]:
    """Returns what is wrong with a kernel, a sentence each."""
    return [*_of_resources(figures), *(_of_main_loop(figures) if figures.variant.kernel == "chunk" else ())]


def hip_violations(figures: HipFigures) -> list[str]:
    """Returns what is wrong with a kernel for AMD's GPUs."""
    return [f"spills {figures.spills} registers"] if figures.spills else []


def lacks_bytes_in_flight(figures: Figures) -> bool:
    """Whether a multiprocessor asks for less than Little's law wants to keep the memory busy."""
    return bytes_in_flight(figures) < device_of(figures.arch).needed_in_flight


def _of_resources(figures: Figures) -> Iterator[str]:
    resources = figures.resources
    if figures.spills or resources.stack or resources.local:
        yield (
            f"keeps values in local memory: {figures.spills} instructions that spill, "
            f"{resources.stack} bytes of stack, {resources.local} of local memory"
        )
    budget = budget_of(figures.variant)
    if resources.registers > budget:
        yield (
            f"takes {resources.registers} registers, more than {budget}: "
            f"{resident_warps(figures.arch, resources)} warps a multiprocessor in place of {budgeted_warps(figures)}"
        )


def _of_main_loop(figures: Figures) -> Iterator[str]:
    loop = figures.loop
    narrow = {width: count for width, count in loop.loads.items() if width < WIDTH}
    if narrow:
        listed = ", ".join(f"{count} of {width} bytes" for width, count in narrow.items())
        yield f"loads less than {WIDTH} bytes at a time in its main loop: {listed}"
    if loop.generic:
        yield f"has {loop.generic} loads in its main loop that do not know that their address is global"
    if "BAR" in loop.opcodes:
        yield "waits at a barrier in its main loop"
    if lacks_bytes_in_flight(figures) and not figures.variant.detail:  # with detail, arithmetic takes longer anyway
        warps = resident_warps(figures.arch, figures.resources)
        needed = device_of(figures.arch).needed_in_flight
        yield (
            f"has {bytes_in_flight(figures):,} bytes in flight a multiprocessor ({loop.bytes_in_flight} of a thread, "
            f"{WARP} threads of a warp, {warps} warps), less than the {needed:,.0f} that hide the latency"
        )
