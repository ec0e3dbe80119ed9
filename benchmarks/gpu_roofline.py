"""How fast a kernel can be at most, by arithmetic on its machine code and on what is published of a GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_figures import WARP, Figures, LoopFigures, Resources

_DATA = Path(__file__).with_name("gpu_devices.json")
_REGISTER_UNIT = 256  # of a warp: registers are handed out in this unit
_WARP_UNIT = 4  # a multiprocessor has four quarters, each with a quarter of the registers
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Device:
    """A GPU, as its maker describes it."""

    name: str
    arch: int
    terabytes_per_second: float
    multiprocessors: int
    gigahertz: float
    source: str

    @property
    def bytes_per_clock(self) -> float:
        """What its memory gives each multiprocessor in a clock, at most."""
        return self.terabytes_per_second * 1e3 / self.multiprocessors / self.gigahertz

    @property
    def needed_in_flight(self) -> float:
        """Bytes that each multiprocessor must have asked for to keep the memory busy (Little's law)."""
        return self.terabytes_per_second * 1e3 / self.multiprocessors * latency_ns()


@dataclass(frozen=True)
class Prediction:
    """The part of a GPU's memory bandwidth that a kernel can reach.

    Attributes:
        fraction: Of the bandwidth, at most 1.
        bound: What, beside the memory, limits it first.
        room: That limit, over the bandwidth.
    """

    fraction: float
    bound: str
    room: float


@functools.cache
def data() -> dict[str, Any]:
    """Returns the data file."""
    loaded: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return loaded


def devices() -> list[Device]:
    """Returns the GPUs that predictions are made for: one an architecture."""
    return [Device(**entry) for entry in data()["devices"]]


def device_of(arch: int) -> Device:
    """Returns the GPU of an architecture."""
    return next(device for device in devices() if device.arch == arch)


def architectures() -> list[int]:
    """Returns those that are known."""
    return [int(arch) for arch in data()["architectures"]]


def latency_ns() -> float:
    """Returns the time from a load to its data, in nanoseconds."""
    return float(data()["latency_nanoseconds"])


def resident_warps(arch: int, resources: Resources) -> int:
    """Returns the warps of a kernel that a multiprocessor can hold at once.

    Registers decide. Shared memory is counted roughly: on newer architectures what the system reserves is in
    `resources` already, and what Triton asks for at the launch, 256 bytes at most, is not.
    """
    limits: Mapping[str, int] = data()["architectures"][str(arch)]
    warps_of_block = _round_up(resources.threads, WARP) // WARP
    by_registers = limits["registers"] // _round_up(resources.registers * WARP, _REGISTER_UNIT)
    shared = resources.shared + limits["shared_reserved"]
    blocks = min(
        limits["blocks"],
        limits["warps"] // warps_of_block,
        by_registers // _WARP_UNIT * _WARP_UNIT // warps_of_block,
        limits["shared"] // _round_up(shared, _SHARED_UNIT),
    )
    return blocks * warps_of_block


def bytes_in_flight(figures: Figures) -> int:
    """Returns the bytes that a multiprocessor has asked for, at most."""
    return resident_warps(figures.arch, figures.resources) * WARP * figures.loop.bytes_in_flight


def predict(figures: Figures, device: Device) -> Prediction:
    """Returns the prediction for a kernel that streams through memory much larger than the caches."""
    loop = figures.loop
    clocks_of_latency = latency_ns() * device.gigahertz
    limits = {
        "latency": bytes_in_flight(figures) / clocks_of_latency,
        "issue": data()["issue_slots"] * loop.bytes_per_warp_instruction,
        **{name: loop.loaded_bytes / clocks for name, clocks in _pipe_clocks(loop, device.arch).items() if clocks},
    }
    bound = min(limits, key=lambda name: limits[name])
    room = limits[bound] / device.bytes_per_clock
    return Prediction(min(1.0, room), bound, room)


def _pipe_clocks(loop: LoopFigures, arch: int) -> dict[str, float]:
    """Clocks of a multiprocessor that a thread's iteration takes of each pipe."""
    left = {name: count for name, count in loop.opcodes.items() if not name.startswith("U")}
    clocks = {}
    for pipe in data()["pipes"]:
        opcodes = list(left) if pipe.get("takes_the_rest") else [*pipe["opcodes"], *pipe.get("twice", ())]
        count = sum(loop.opcodes.get(name, 0) * (2 if name in pipe.get("twice", ()) else 1) for name in opcodes)
        if pipe["lanes"]:
            clocks[pipe["name"]] = count / pipe["lanes"][str(arch)]
        for name in opcodes:
            left.pop(name, None)
    return clocks


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
