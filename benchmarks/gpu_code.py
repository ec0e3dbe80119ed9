"""What the machine code of the GPU kernels says, without a GPU: compiles all of them, reads them, and judges.

    python benchmarks/gpu_code.py [--json FILE] [--markdown FILE] [--arch 90] [--arch gfx942] [--backend triton|cuda]

Triton compiles for NVIDIA's and, to see that it does, for AMD's GPUs; nvcc, where it is installed, the CUDA sources.
NVIDIA's tools that read machine code come with Triton.

Exit code: 0 clean, 1 violations, 2 it could not be checked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import gpu_document
from gpu_binaries import (
    HIP_TARGET,
    Call,
    CannotCheck,
    HipFigures,
    bucket_call,
    compiler_versions,
    cuda_figures,
    hip_figures,
    nvcc_command,
    triton_figures,
)
from gpu_figures import Figures
from gpu_gate import budget_of, hip_violations, violations
from gpu_roofline import architectures, bytes_in_flight, device_of, predict, resident_warps
from gpu_sass import UnknownCode
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hallo_numguard.ops.backends.triton import INTERPRET_VARIABLE, kernels

BACKENDS = ("triton", "cuda")
ARCHITECTURES = (*map(str, architectures()), HIP_TARGET)
DOCUMENT_COMMAND = "python benchmarks/gpu_code.py --markdown docs/gpu.md"
_PROCESSES = 2
_WIDTH = 140  # where the output is not a terminal


@dataclass
class Report:
    """All that was found."""

    versions: dict[str, str]
    left_out: dict[str, str]
    figures: list[Figures] = field(default_factory=list)
    hip: list[HipFigures] = field(default_factory=list)

    @property
    def violations(self) -> list[tuple[str, str]]:
        """Which kernels do what they must not."""
        nvidia = [(f"{one.variant}, sm_{one.arch}", text) for one in self.figures for text in violations(one)]
        amd = [(f"{one.variant}, {one.target}", text) for one in self.hip for text in hip_violations(one)]
        return nvidia + amd

    def as_json(self) -> dict[str, Any]:
        """The same, for other programs."""
        return {
            "versions": self.versions,
            "left_out": self.left_out,
            "kernels": [_as_json(one) for one in self.figures],
            "hip": [vars(one) | {"variant": str(one.variant), "violations": hip_violations(one)} for one in self.hip],
        }


def _as_json(figures: Figures) -> dict[str, Any]:
    device = device_of(figures.arch)
    return {
        "variant": str(figures.variant),
        "arch": figures.arch,
        **vars(figures.resources),
        "spills": figures.spills,
        "warps": resident_warps(figures.arch, figures.resources),
        "main_loop": vars(figures.loop),
        "bytes_in_flight": bytes_in_flight(figures),
        "needed_in_flight": device.needed_in_flight,
        "prediction": vars(predict(figures, device)),
        "violations": violations(figures),
    }


@click.command(help="Reads the machine code of the GPU kernels, and judges it. Needs no GPU.")
@click.option("--arch", "archs", type=click.Choice(ARCHITECTURES), multiple=True, help="Repeat; default: all.")
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, help="Repeat; default: both.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="As docs/gpu.md.")
def main(archs: tuple[str, ...], backends: tuple[str, ...], json_path: Path | None, markdown_path: Path | None) -> None:
    """Parses the command line, checks, prints and writes."""
    if markdown_path is not None and (archs or backends):
        raise click.UsageError("the document is about all architectures and backends: leave --arch and --backend out")
    os.environ.pop(INTERPRET_VARIABLE, None)  # else nothing would be compiled
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    try:
        report = check(archs or ARCHITECTURES, backends)
        if markdown_path is not None:
            _write_document(report, markdown_path)
    except (CannotCheck, UnknownCode) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    _print(console, report)
    sys.exit(1 if report.violations else 0)


def check(archs: Sequence[str], backends: Sequence[str]) -> Report:
    """Compiles and reads the kernels.

    Args:
        archs: Of `ARCHITECTURES`.
        backends: Those that must be checked; if none is named, those that can be.

    Raises:
        CannotCheck: If one cannot be checked that is named, or none can.
    """
    missing = _missing()
    unchecked = [name for name in backends if name in missing]
    if unchecked or len(missing) == len(BACKENDS):
        raise CannotCheck("; ".join(missing[name] for name in unchecked or missing))
    chosen = [name for name in backends or BACKENDS if name not in missing]
    report = Report(compiler_versions(), {} if backends else missing)
    # Spawned, not forked: a fork of a process with torch's threads in it may hang.
    with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit({"triton": triton_figures, "cuda": cuda_figures}[backend], int(arch))
            for backend in chosen
            for arch in archs
            if arch != HIP_TARGET
        ]
        hip_jobs = [pool.submit(hip_figures)] if "triton" in chosen and HIP_TARGET in archs else []
        report.figures = [one for job in jobs for one in job.result()]
        report.hip = [one for job in hip_jobs for one in job.result()]
    if not report.figures and not report.hip:
        raise CannotCheck(f"nothing is compiled by {', '.join(chosen)} for {', '.join(archs)}")
    return report


def _missing() -> dict[str, str]:
    """Of each backend that cannot be compiled here, why."""
    if kernels() is None:
        reason = "triton is not installed, and its wheel has the tools that read machine code"
        return dict.fromkeys(BACKENDS, reason)
    if nvcc_command() is None:
        return {"cuda": "nvcc is not installed (set CUDACXX or CUDA_HOME)"}
    return {}


def _write_document(report: Report, path: Path) -> None:
    if report.left_out:
        raise CannotCheck("; ".join(report.left_out.values()))
    path.write_text(document(report), encoding="utf-8")


def document(report: Report) -> str:
    """Returns the text of docs/gpu.md."""
    return gpu_document.render(report.figures, report.hip, _bucket(), report.versions, DOCUMENT_COMMAND)


def _bucket() -> Call:
    problem = json.loads(gpu_document.PEERS.read_text(encoding="utf-8"))["problem"]
    return bucket_call(problem["elements"], problem["tensors"])


def _print(console: Console, report: Report) -> None:
    console.print(", ".join(f"{name} {version}" for name, version in report.versions.items()), style="dim")
    for arch in dict.fromkeys(one.arch for one in report.figures):
        console.print(_table(arch, [one for one in report.figures if one.arch == arch]))
    for name, reason in report.left_out.items():
        console.print(f"[yellow]left out[/yellow]: {name}: {reason}", highlight=False)
    for kernel, text in report.violations:
        console.print(Text(f"{kernel}: {text}", style="red"))
    if not report.violations:
        amd = f", {len(report.hip)} for AMD" if report.hip else ""
        console.print(f"[green]clean[/green]: {len(report.figures)} kernels for NVIDIA{amd}", highlight=False)


def _table(arch: int, figures: Sequence[Figures]) -> Table:
    device = device_of(arch)
    title = f"sm_{arch}; wanted in flight for {device.name}: {device.needed_in_flight / 1024:.0f} KiB"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("regs", "of", "warps", "loads", "in flight", "KiB", "instr.", "B / instr.", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in figures:
        loop, prediction = one.loop, predict(one, device)
        table.add_row(
            Text(str(one.variant), style="red" if violations(one) else ""),
            str(one.resources.registers),
            str(budget_of(one.variant)),
            str(resident_warps(arch, one.resources)),
            " + ".join(f"{count} x {width} B" for width, count in loop.loads.items()),
            str(loop.in_flight),
            f"{bytes_in_flight(one) / 1024:.0f}",
            str(loop.instructions),
            f"{loop.bytes_per_warp_instruction:.1f}",
            f"{prediction.fraction:.2f} ({prediction.bound} {prediction.room:.1f})",
        )
    return table


if __name__ == "__main__":
    main()
