"""Compiles all GPU kernels without a GPU, reads their machine code, and refuses what would make them slow.

    python tools/check_gpu_kernels.py [--arch 90] [--arch gfx942] [--backend triton|cuda] [--json FILE]

Refused are registers that spill, local memory, loads of less than 16 bytes or of unknown space and barriers in the
main loop, and registers over budget. Triton compiles for NVIDIA and AMD GPUs; nvcc, where it is installed, the CUDA
sources. NVIDIA's tools that read machine code come with Triton.

Exit code: 0 clean, 1 violations, 2 it could not be checked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from gpu_compilers import (
    CUDA_ARCHITECTURES,
    HIP_TARGET,
    CannotCheck,
    compiler_versions,
    cuda_figures,
    hip_figures,
    nvcc_command,
    triton_figures,
)
from kernel_checks import Figures, HipFigures
from sass import UnknownCode

from hallo_numguard.ops.triton import INTERPRET_VARIABLE, kernels

BACKENDS = {"triton": triton_figures, "cuda": cuda_figures}
ARCHITECTURES = (*map(str, CUDA_ARCHITECTURES), HIP_TARGET)
PROCESSES = 2


@dataclass
class Report:
    """What was compiled, and what was not.

    Attributes:
        versions: Versions of the compilers, by name.
        left_out: Why a backend was not checked, by name.
        nvidia: Kernels for NVIDIA GPUs.
        amd: Kernels for an AMD GPU.
    """

    versions: dict[str, str]
    left_out: dict[str, str]
    nvidia: list[Figures]
    amd: list[HipFigures]

    @property
    def violations(self) -> list[str]:
        """What is wrong, a line each."""
        return [
            *(f"{one.variant}, sm_{one.arch}: {text}" for one in self.nvidia for text in one.violations),
            *(f"{one.variant}, {one.target}: {text}" for one in self.amd for text in one.violations),
        ]


@click.command()
@click.option("--arch", "archs", type=click.Choice(ARCHITECTURES), multiple=True, help="Repeat; default: all.")
@click.option("--backend", "backends", type=click.Choice(list(BACKENDS)), multiple=True, help="Repeat; default: all.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures.")
def main(archs: tuple[str, ...], backends: tuple[str, ...], json_path: Path | None) -> None:
    """Compile the GPU kernels, read their machine code and check it. Needs no GPU."""
    os.environ.pop(INTERPRET_VARIABLE, None)  # else nothing would be compiled
    try:
        report = check(archs or ARCHITECTURES, backends)
    except (CannotCheck, UnknownCode) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    if json_path is not None:
        json_path.write_text(_as_json(report), encoding="utf-8")
    click.echo(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for name, reason in report.left_out.items():
        click.echo(f"left out: {name}: {reason}")
    for violation in report.violations:
        click.echo(violation)
    if not report.violations:
        click.echo(f"clean: {len(report.nvidia)} kernels for NVIDIA, {len(report.amd)} for AMD")
    sys.exit(1 if report.violations else 0)


def check(archs: Sequence[str], backends: Sequence[str]) -> Report:
    """Compiles and reads the kernels.

    Args:
        archs: Members of `ARCHITECTURES`.
        backends: Backends that must be checked; if empty, those that can be.

    Raises:
        CannotCheck: If a named backend cannot be checked, or none can.
    """
    missing = _missing()
    unchecked = [name for name in backends if name in missing]
    if unchecked or len(missing) == len(BACKENDS):
        raise CannotCheck("; ".join(missing[name] for name in unchecked or missing))
    chosen = [name for name in backends or BACKENDS if name not in missing]
    # Spawned, not forked: a fork of a process with torch's threads in it may hang.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(BACKENDS[name], int(arch)) for name in chosen for arch in archs if arch != HIP_TARGET]
        hip_jobs = [pool.submit(hip_figures)] if "triton" in chosen and HIP_TARGET in archs else []
        nvidia = [one for job in jobs for one in job.result()]
        amd = [one for job in hip_jobs for one in job.result()]
    if not nvidia and not amd:
        raise CannotCheck(f"nothing is compiled by {', '.join(chosen)} for {', '.join(archs)}")
    return Report(compiler_versions(), {} if backends else missing, nvidia, amd)


def _missing() -> dict[str, str]:
    """Returns why a backend cannot be compiled here, by name."""
    if kernels() is None:
        reason = "triton is not installed, and its wheel has the tools that read machine code"
        return dict.fromkeys(BACKENDS, reason)
    if nvcc_command() is None:
        return {"cuda": "nvcc is not installed (set CUDACXX or CUDA_HOME)"}
    return {}


def _as_json(report: Report) -> str:
    everything: list[Figures | HipFigures] = [*report.nvidia, *report.amd]
    kernels = [asdict(one) | {"variant": str(one.variant), "violations": one.violations} for one in everything]
    document = {"versions": report.versions, "left_out": report.left_out, "kernels": kernels}
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    main()
