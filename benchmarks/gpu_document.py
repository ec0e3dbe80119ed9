"""Writes docs/gpu.md: prose from a template, numbers from the machine code and from cited data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from gpu_binaries import HIP_TARGET, Call, HipFigures
from gpu_figures import Figures, Variant
from gpu_gate import BUDGETS, WIDTH, budgeted_warps, lacks_bytes_in_flight
from gpu_roofline import (
    bytes_in_flight,
    data,
    device_of,
    devices,
    latency_ns,
    predict,
    resident_warps,
)

PEERS = Path(__file__).with_name("gpu_peers.json")
_TEMPLATE = Path(__file__).with_name("gpu_document.md.j2")
_NAMES = {"triton": "Triton", "cuda": "CUDA C++"}


@dataclass(frozen=True)
class Row:
    """A kernel in the tables: where it has several variants of no other difference, the one that takes most."""

    figures: Figures

    @property
    def name(self) -> str:
        """What it is, in words."""
        variant = self.figures.variant
        return " ".join([variant.dtype or variant.kernel, *(["detail"] if variant.detail else [])])

    @property
    def backend(self) -> str:
        """Who compiled it."""
        return _NAMES[self.figures.variant.backend]

    @property
    def lacks_bytes(self) -> bool:
        """Whether it has a star."""
        return lacks_bytes_in_flight(self.figures)

    @property
    def cells(self) -> list[str]:
        """The columns of the table of the machine code."""
        figures, loop, item_size = self.figures, self.figures.loop, self.figures.variant.item_size
        loads = " + ".join(f"{count} x {width} B" for width, count in loop.loads.items())
        per_element = f"{loop.instructions_per_element(item_size):.1f}" if item_size else "-"
        flying = f"{bytes_in_flight(figures) / 1024:.0f}" + ("*" if self.lacks_bytes else "")
        return [
            self.name,
            self.backend,
            str(figures.resources.registers),
            str(resident_warps(figures.arch, figures.resources)),
            loads,
            str(loop.in_flight),
            flying,
            str(loop.instructions),
            per_element,
            f"{loop.bytes_per_warp_instruction:.1f}",
        ]


def render(
    figures: Sequence[Figures], hip: Sequence[HipFigures], bucket: Call, versions: dict[str, str], command: str
) -> str:
    """Returns the document.

    Args:
        figures: Of all kernels, on all architectures.
        hip: Of the Triton kernels on an AMD GPU.
        bucket: The call that is compared with the peers.
        versions: Of the compilers.
        command: What makes the document.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["row"] = lambda cells: "| " + " | ".join(cells) + " |"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    rows = _rows(figures)
    peers = json.loads(PEERS.read_text(encoding="utf-8"))
    text = template.render(
        command=command,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        devices=[(device, [row for row in rows if row.figures.arch == device.arch]) for device in devices()],
        architectures=[f"sm_{device.arch}" for device in devices()],
        gpus=[device.name for device in devices()],
        kernels=len(figures),
        hip=hip,
        hip_target=HIP_TARGET,
        width=WIDTH,
        latency=f"{latency_ns():.0f}",
        data=data(),
        budgets=_budgets(figures),
        predictions=_predictions(rows),
        peers=peers,
        bucket=bucket,
        traffic=f"{1 + bucket.other_bytes / bucket.data_bytes:.3f}",
        needed=lambda device: f"{device.needed_in_flight / 1024:.0f}",
    )
    return text.rstrip() + "\n"


def _rows(figures: Sequence[Figures]) -> list[Row]:
    worst: dict[tuple[int, str, Variant], Figures] = {}
    for one in figures:
        variant = one.variant
        key = (one.arch, variant.backend, Variant("", variant.kernel, variant.dtype, variant.detail))
        known = worst.get(key)
        if known is None or _weight(one) > _weight(known):
            worst[key] = one
    order = {dtype: number for number, dtype in enumerate(dict.fromkeys(one.variant.dtype for one in figures))}

    def place(one: Figures) -> tuple[bool, int, bool, bool]:
        variant = one.variant
        return (variant.kernel != "chunk", order[variant.dtype], variant.detail, variant.backend != "triton")

    return [Row(one) for one in sorted(worst.values(), key=place)]


def _weight(figures: Figures) -> tuple[int, int]:
    return figures.resources.registers, figures.loop.instructions


def _budgets(figures: Sequence[Figures]) -> list[list[str]]:
    """Of each budget: what it is for, the most that is taken, and the warps that it leaves on each architecture."""
    rows = []
    for (backend, kernel, item_size, detail), registers in BUDGETS.items():
        key = (backend, kernel, item_size, detail)
        of_it = [one for one in figures if _budget_key(one.variant) == key]
        what = f"{kernel}, {item_size} B an element{', detail' if detail else ''}" if item_size else kernel
        warps = {one.arch: budgeted_warps(one) for one in of_it}
        most = max(one.resources.registers for one in of_it)
        rows.append(
            [_NAMES[backend], what, str(registers), str(most), *(str(warps[device.arch]) for device in devices())]
        )
    return rows


def _budget_key(variant: Variant) -> tuple[str, str, int, bool]:
    return variant.backend, variant.kernel, variant.item_size, variant.detail


def _predictions(rows: Sequence[Row]) -> list[list[str]]:
    """Of each kernel, what is predicted on each GPU."""
    chunk = [row for row in rows if row.figures.variant.kernel == "chunk"]
    table: dict[tuple[str, str], dict[int, str]] = {}
    for row in chunk:
        table.setdefault((row.name, row.backend), {})[row.figures.arch] = _prediction(row.figures)
    return [[*key, *(cells[device.arch] for device in devices())] for key, cells in table.items()]


def _prediction(figures: Figures) -> str:
    prediction = predict(figures, device_of(figures.arch))
    return f"{prediction.fraction:.2f} ({prediction.bound} {prediction.room:.1f})"
