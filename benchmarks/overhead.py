"""How fast the statistics are, against the memory-read limit and all else that does the work.

    python benchmarks/overhead.py [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE.png]

Candidates take turns in every round, each between two passes over the same buffer that set the limit, so that noise
hits all alike. Before anything is timed, all results are checked on planted values. What differs between devices is
in device.py.

Exit code: 0 done, 1 a candidate gave a wrong result, 2 wrong usage, or nothing there to measure.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import plot
import tables
import torch
from candidates import PUBLIC, PUBLIC_ONE, Candidate, public, sort_out
from device import DEVICES, Device, Unusable
from problem import DTYPES, Problem, make_problem
from results import KIB, MANY, MANY_ONE, MIB, Run, Sample, Setting, samples_of, size_label
from rich.console import Console
from timing import Effort, measure
from verify import WrongResult, check

DTYPE_NAMES = ("fp32", "bf16", "fp16")
QUICK_DTYPE_NAMES = ("fp32", "bf16")
SECONDS, QUICK_SECONDS = 100.0, 6.0
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS, QUICK_FEWEST_ROUNDS = 15, 3, 3
MOST_ROUNDS = 300

LARGE = 32 * MIB
LARGE_SHARE = 5.0  # of the time, for a size beyond it, in shares of a smaller one
MANY_SEGMENTS, MANY_BYTES = 10_000, 8 * KIB


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sizes: Sequence[int]
    dtypes: Sequence[str]
    segments: int
    threads: Sequence[int | None]
    seconds: float
    fewest_rounds: int
    with_compile: bool
    with_many: bool


@click.command(help="Measures the statistics against the memory-read limit and their peers.")
@click.option("--device", "device_name", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--size", "sizes", type=float, multiple=True, help="MiB; may be a fraction; repeat.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Repeat.")
@click.option("--segments", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="Of the CPU; repeat.")
@click.option("--seconds", type=float, help="About how long to time in all, checks excluded.")
@click.option("--quick", is_flag=True, help="Less of everything: to see that it works.")
@click.option("--compile/--no-compile", "with_compile", default=True, help="torch.compile, too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    device_name: str,
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
    device = DEVICES[device_name]
    console = Console()
    if not console.is_terminal:
        console = Console(width=tables.WIDTH)
    try:
        device.require()
        if plot_path is not None:
            plot.require_matplotlib()
        options = Options(
            sizes=[max(1, round(size * MIB)) for size in sizes] or (device.quick_sizes if quick else device.sizes),
            dtypes=dtypes or (QUICK_DTYPE_NAMES if quick else DTYPE_NAMES),
            segments=segments,
            threads=device.thread_counts(threads, quick),
            seconds=seconds if seconds is not None else (QUICK_SECONDS if quick else SECONDS),
            fewest_rounds=QUICK_FEWEST_ROUNDS if quick else FEWEST_ROUNDS,
            with_compile=with_compile,
            with_many=not quick,
        )
        run = run_all(device, options, console)
    except (Unusable, plot.MissingPlotting) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except WrongResult as error:
        raise click.ClickException(f"wrong result, so nothing was timed: {error}") from error
    if json_path is not None:
        json_path.write_text(json.dumps(run.as_json(), indent=1, allow_nan=False) + "\n")
    if plot_path is not None:
        plot.draw(run, plot_path)


def run_all(device: Device, options: Options, console: Console) -> Run:
    """Measures and prints everything."""
    run = Run(device.name(), device.limit, device.prepare(), vars(options).copy())
    tables.print_header(console, run, device.time)
    sizes = _sizes_with_room(device, options, run.skipped)
    for size, threads in itertools.product(sizes, options.threads):
        samples = [
            sample for dtype in options.dtypes for sample in _measure_buffer(device, options, size, dtype, threads, run)
        ]
        tables.print_table(console, samples)
        run.samples += samples
    if options.with_many:
        for threads in options.threads:
            samples = _measure_many(device, options, threads)
            tables.print_table(console, samples)
            run.samples += samples
    run.targets = device.targets(run)
    tables.print_run(console, run)
    return run


def _sizes_with_room(device: Device, options: Options, skipped: dict[str, str]) -> list[int]:
    reasons = {size: device.no_room(size, options.segments) for size in options.sizes}
    too_large = {size_label(size): reason for size, reason in reasons.items() if reason is not None}
    if len(too_large) == len(reasons):
        raise Unusable("; ".join(f"{size} {reason}" for size, reason in too_large.items()))
    skipped.update(too_large)
    return [size for size, reason in reasons.items() if reason is None]


def _measure_buffer(
    device: Device, options: Options, size: int, dtype: str, threads: int | None, run: Run
) -> list[Sample]:
    """Everything on one buffer. Adds to the run what is left out."""
    _use(threads)
    problem = make_problem(size, dtype, options.segments, device.torch_device)
    made = device.ours(problem) | device.peers(problem, options.with_compile)
    candidates, reasons = sort_out(made)
    run.skipped.update(reasons)
    seconds = options.seconds * _share(size) / _shares(options)
    return _samples(device, problem, threads, candidates, _effort(options, seconds))


def _measure_many(device: Device, options: Options, threads: int | None) -> list[Sample]:
    """Many small segments against one of the same bytes."""
    _use(threads)
    problem = make_problem(MANY_SEGMENTS * MANY_BYTES, "fp32", MANY_SEGMENTS, device.torch_device)
    names = {
        PUBLIC: (MANY, "ours: tensor_stats, 10,000 segments of 8 KiB"),
        PUBLIC_ONE: (MANY_ONE, "ours: tensor_stats, one segment"),
    }
    candidates = [
        replace(candidate, key=names[candidate.key][0], label=names[candidate.key][1])
        for candidate in public(problem)
        if candidate.key in names
    ]
    return _samples(device, problem, threads, candidates, _effort(options, seconds=3.0))


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _samples(
    device: Device, problem: Problem, threads: int | None, candidates: list[Candidate], effort: Effort
) -> list[Sample]:
    limits = device.limits(problem)
    candidates = [*limits, *candidates]
    norm_errors = check(problem, candidates)
    calls = {candidate.key: candidate.call for candidate in candidates}
    series = measure(device.clock(problem), limits[0].call, calls, effort)
    setting = Setting(problem.bytes, problem.dtype, threads, problem.layout.segments)
    return samples_of(setting, candidates, series, norm_errors)


def _effort(options: Options, seconds: float) -> Effort:
    slow = min(FEWEST_SLOW_ROUNDS, options.fewest_rounds)
    return Effort(seconds, options.fewest_rounds, slow, MOST_ROUNDS)


def _share(size: int) -> float:
    return LARGE_SHARE if size > LARGE else 1.0


def _shares(options: Options) -> float:
    per_size = sum(_share(size) for size in options.sizes)
    return per_size * len(options.threads) * len(options.dtypes)


if __name__ == "__main__":
    main()
