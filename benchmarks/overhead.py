"""How fast the statistics are, against the memory-read limit and all else that does the work.

    python benchmarks/overhead.py [--quick] [--json FILE] [--plot FILE.png]

Candidates take turns in every round, each between two reads of the same buffer, so that noise hits
all alike. Before anything is timed, all results are checked on planted values. Where the allocator
can be told so, it keeps what is freed: else the peers pay for page faults at some times only.

Exit code: 0 done, 1 a candidate gave a wrong result, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import plot
import tables
import torch
from candidates import Candidate, ours, read_call, read_limits
from machine import describe, keep_freed_memory
from peers import peers
from problem import DTYPES, Problem, make_problem
from results import KIB, MANY, MANY_ONE, MIB, Run, Sample, Setting, samples_of, targets
from rich.console import Console
from timing import Effort, measure
from verify import WrongResult, check

from hallo_numguard.errors import BackendUnavailable
from hallo_numguard.ops import dispatch, native

SIZES = (4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 256 * MIB)
QUICK_SIZES = (64 * KIB, 4 * MIB)
DTYPE_NAMES = ("fp32", "bf16", "fp16")
QUICK_DTYPE_NAMES = ("fp32", "bf16")
SECONDS, QUICK_SECONDS = 100.0, 6.0
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS, QUICK_FEWEST_ROUNDS = 15, 3, 3
MOST_ROUNDS = 300

CACHED = 32 * MIB  # no cache that one core reads alone is much larger
LARGE_SHARE = 5.0  # of the time, for a size beyond it, in shares of a smaller one
MANY_SEGMENTS, MANY_BYTES = 10_000, 8 * KIB


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sizes: Sequence[int]
    dtypes: Sequence[str]
    segments: int
    threads: Sequence[int]
    seconds: float
    fewest_rounds: int
    with_compile: bool
    with_many: bool


@click.command(help="Measures the statistics against the memory-read limit and their peers.")
@click.option("--size", "sizes", type=float, multiple=True, help="MiB; may be a fraction; repeat.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Repeat.")
@click.option("--segments", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="Repeat.")
@click.option("--seconds", type=float, help="About how long to time in all, checks excluded.")
@click.option("--quick", is_flag=True, help="Less of everything: to see that it works.")
@click.option("--compile/--no-compile", "with_compile", default=True, help="torch.compile, too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    sizes: tuple[float, ...],
    dtypes: tuple[str, ...],
    segments: int,
    threads: tuple[int, ...],
    seconds: float | None,
    quick: bool,
    with_compile: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Parses the command line, runs, prints and writes."""
    _require_native()
    if plot_path is not None:
        _require_plotting()
    options = Options(
        sizes=[max(1, round(size * MIB)) for size in sizes] or (QUICK_SIZES if quick else SIZES),
        dtypes=dtypes or (QUICK_DTYPE_NAMES if quick else DTYPE_NAMES),
        segments=segments,
        threads=threads or ([1] if quick else [1, *([2] if (os.cpu_count() or 1) > 1 else [])]),
        seconds=seconds if seconds is not None else (QUICK_SECONDS if quick else SECONDS),
        fewest_rounds=QUICK_FEWEST_ROUNDS if quick else FEWEST_ROUNDS,
        with_compile=with_compile,
        with_many=not quick,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=tables.WIDTH)
    try:
        run = run_all(options, console)
    except WrongResult as error:
        raise click.ClickException(f"wrong result, so nothing was timed: {error}") from error
    if json_path is not None:
        json_path.write_text(json.dumps(run.as_json(), indent=1, allow_nan=False) + "\n")
    if plot_path is not None:
        plot.draw(run, plot_path)


def run_all(options: Options, console: Console) -> Run:
    """Measures and prints everything."""
    kept = "kept by the allocator" if keep_freed_memory() else "as the allocator likes"
    run = Run(machine=describe() | {"freed memory": kept}, options=vars(options).copy())
    tables.print_header(console, run.machine)
    shares = _shares(options)
    for size, threads in itertools.product(options.sizes, options.threads):
        samples: list[Sample] = []
        for dtype in options.dtypes:
            problem = make_problem(size, dtype, options.segments)
            effort = _effort(options, problem, options.seconds * _share(size) / shares)
            samples += _measure_problem(problem, threads, effort, options.with_compile, run.skipped)
        tables.print_table(console, samples)
        run.samples += samples
    if options.with_many:
        for threads in options.threads:
            samples = _measure_many(threads, options)
            tables.print_table(console, samples)
            run.samples += samples
    run.targets = targets(run)
    tables.print_run(console, run)
    return run


def _measure_problem(
    problem: Problem, threads: int, effort: Effort, with_compile: bool, skipped: dict[str, str]
) -> list[Sample]:
    torch.set_num_threads(threads)
    others, reasons = peers(problem, with_compile)
    skipped.update(reasons)
    return _samples(problem, [*read_limits(problem), *ours(problem), *others], effort)


def _measure_many(threads: int, options: Options) -> list[Sample]:
    """Many small segments against one of the same bytes."""
    torch.set_num_threads(threads)
    problem = make_problem(MANY_SEGMENTS * MANY_BYTES, "fp32", MANY_SEGMENTS)
    names = {
        "ours_public": (MANY, "ours: tensor_stats, 10,000 segments of 8 KiB"),
        "ours_public_one_segment": (MANY_ONE, "ours: tensor_stats, one segment"),
    }
    candidates = [
        replace(candidate, key=names[candidate.key][0], label=names[candidate.key][1])
        for candidate in ours(problem)
        if candidate.key in names
    ]
    effort = _effort(options, problem, seconds=3.0)
    return _samples(problem, [*read_limits(problem), *candidates], effort)


def _samples(problem: Problem, candidates: list[Candidate], effort: Effort) -> list[Sample]:
    checked = check(problem, candidates)
    calls = {candidate.key: candidate.call for candidate in candidates}
    series = measure(read_call(problem, False), calls, effort, checked.costs)
    setting = Setting(problem.bytes, problem.dtype, torch.get_num_threads(), problem.layout.segments)
    return samples_of(setting, candidates, series, checked)


def _effort(options: Options, problem: Problem, seconds: float) -> Effort:
    warm = problem.bytes <= CACHED
    slow = min(FEWEST_SLOW_ROUNDS, options.fewest_rounds)
    return Effort(seconds, options.fewest_rounds, slow, MOST_ROUNDS, warm)


def _share(size: int) -> float:
    return LARGE_SHARE if size > CACHED else 1.0


def _shares(options: Options) -> float:
    per_size = sum(_share(size) for size in options.sizes)
    return per_size * len(options.threads) * len(options.dtypes)


def _require_native() -> None:
    """Exits with 2 where the numbers would be those of the slow fallback."""
    reason = native.unavailable("cpu")
    if reason is not None:
        _stop(f"there is nothing to measure: {reason}")
    try:
        chosen = dispatch.backend_for("cpu")
    except BackendUnavailable as error:
        _stop(str(error))
    if chosen is not dispatch.backend("native"):
        _stop(f"{dispatch.BACKEND_VARIABLE} names another backend than native: unset it")


def _require_plotting() -> None:
    try:
        plot.require_matplotlib()
    except plot.MissingPlotting as error:
        _stop(str(error))


def _stop(message: str) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
