"""Compiles all GPU kernels without a GPU, reads their machine code, and refuses what would make them slow.

    python tools/check_gpu_kernels.py [--arch 90] [--arch gfx942] [--backend triton|cuda] [--json FILE]

Refused are registers that spill, local memory, loads of less than 16 bytes or of unknown space and barriers in the
main loop, and registers over budget. Triton compiles for NVIDIA and AMD GPUs; the CUDA kernels are read from the
extension, where that is built. NVIDIA's tools that read machine code come with Triton.

Exit code: 0 clean, 1 violations, 2 it could not be checked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
from gpu_compilers import (
    CUDA_ARCHITECTURES,
    HIP_TARGET,
    CannotCheck,
    compiler_versions,
    cuda_extension,
    cuda_figures,
    hip_figures,
    triton_figures,
)
from kernel_checks import Figures, HipFigures
from sass import UnknownCode

from hallo_numguard.ops.backends import triton as launcher

BACKENDS = {"triton": triton_figures, "cuda": cuda_figures}
ARCHITECTURES = (*map(str, CUDA_ARCHITECTURES), HIP_TARGET)
PROCESSES = 2


@click.command()
@click.option("--arch", "archs", type=click.Choice(ARCHITECTURES), multiple=True, help="Repeat; default: all.")
@click.option("--backend", "backends", type=click.Choice(list(BACKENDS)), multiple=True, help="Repeat; default: all.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures.")
def main(archs: tuple[str, ...], backends: tuple[str, ...], json_path: Path | None) -> None:
    """Compile the Triton kernels, and check the machine code of these and of the CUDA extension. Needs no GPU."""
    os.environ.pop(launcher.INTERPRET_VARIABLE, None)  # else nothing would be compiled
    missing = _missing()
    try:
        kernels = check(archs or ARCHITECTURES, backends, missing)
        versions = compiler_versions()
    except (CannotCheck, UnknownCode) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    left_out = {} if backends else missing
    violations = [f"{kernel}: {text}" for kernel in kernels for text in kernel.violations]
    if json_path is not None:
        listed = [
            asdict(kernel) | {"variant": str(kernel.variant), "violations": kernel.violations} for kernel in kernels
        ]
        document = {"versions": versions, "left_out": left_out, "kernels": listed}
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    click.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, reason in left_out.items():
        click.echo(f"left out: {name}: {reason}")
    for violation in violations:
        click.echo(violation)
    if not violations:
        click.echo(f"clean: {len(kernels)} kernels")
    sys.exit(1 if violations else 0)


def check(archs: Sequence[str], backends: Sequence[str], missing: Mapping[str, str]) -> list[Figures | HipFigures]:
    """Compiles and reads the kernels.

    Args:
        archs: Members of `ARCHITECTURES`.
        backends: Backends that must be checked; if empty, those that can be.
        missing: Why a backend cannot be compiled here, by name.

    Raises:
        CannotCheck: If a named backend cannot be checked, or none can.
    """
    unchecked = [name for name in backends if name in missing]
    if unchecked or len(missing) == len(BACKENDS):
        raise CannotCheck("; ".join(missing[name] for name in unchecked or missing))
    chosen = [name for name in backends or BACKENDS if name not in missing]
    # Spawned, not forked: a fork of a process with torch's threads in it may hang.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(BACKENDS[name], int(arch)) for name in chosen for arch in archs if arch != HIP_TARGET]
        hip_jobs = [pool.submit(hip_figures)] if "triton" in chosen and HIP_TARGET in archs else []
        found: list[Figures | HipFigures] = [one for job in jobs for one in job.result()]
        found += [one for job in hip_jobs for one in job.result()]
    if not found:
        raise CannotCheck(f"nothing is compiled by {', '.join(chosen)} for {', '.join(archs)}")
    return found


def _missing() -> dict[str, str]:
    """Returns why a backend cannot be compiled here, by name."""
    if launcher.kernels() is None:
        reason = "triton is not installed, and its wheel has the tools that read machine code"
        return dict.fromkeys(BACKENDS, reason)
    if cuda_extension() is None:
        return {"cuda": "the extension with the CUDA kernels is not built (`make test` does that where nvcc is)"}
    return {}


if __name__ == "__main__":
    main()
