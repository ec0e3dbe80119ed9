"""How fast the statistics are, against the memory-read limit and all else that does the work.

    python benchmarks/overhead.py [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE.png]

Candidates take turns in every round, each between two passes over the same buffer that set the limit, so that noise
hits all alike. Before anything is timed, all results are checked on planted values. What differs between devices is
in devices.py, what is measured in candidates.py.

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
import torch
from candidates import PUBLIC, PUBLIC_ONE, Candidate, public
from devices import DEVICES, Device, Unusable
from figures import (
    KIB,
    MANY,
    MANY_ONE,
    MIB,
    Run,
    Sample,
    Setting,
    print_header,
    print_samples,
    print_targets,
    samples_of,
    size_label,
)
from output import json_option, make_console, quick_option
from problems import DTYPES, Problem, make_problem
from rich.console import Console
from timing import Effort, measure
from verify import WrongResult, check

DTYPE_NAMES = ("fp32", "bf16", "fp16")
QUICK_DTYPE_NAMES = ("fp32", "bf16")
SECONDS, QUICK_SECONDS = 100.0, 6.0
MIN_ROUNDS, MIN_SLOW_ROUNDS, QUICK_MIN_ROUNDS = 15, 3, 3
MAX_ROUNDS = 300

LARGE_BYTES = 32 * MIB
LARGE_SHARE = 5.0  # time for a larger size, over that for a smaller one
MANY_SEGMENTS, MANY_SEGMENT_BYTES = 10_000, 8 * KIB
MANY_SECONDS = 3.0


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        sizes: Sizes of the buffers, bytes.
        dtypes: Keys of `DTYPES`.
        segments: Segments of each buffer.
        threads: Numbers of threads; None where it makes no difference.
        seconds: Time to measure in all, checks excluded.
        min_rounds: Fewest rounds.
        with_compile: Whether torch.compile is measured.
        with_many: Whether many small segments are measured against one.
    """

    sizes: Sequence[int]
    dtypes: Sequence[str]
    segments: int
    threads: Sequence[int | None]
    seconds: float
    min_rounds: int
    with_compile: bool
    with_many: bool

    def effort(self, seconds: float) -> Effort:
        """Returns how long to measure one buffer."""
        return Effort(seconds, self.min_rounds, min(MIN_SLOW_ROUNDS, self.min_rounds), MAX_ROUNDS)

    def seconds_for(self, size: int) -> float:
        """Returns the part of the time for one buffer of that size."""
        shares = {each: LARGE_SHARE if each > LARGE_BYTES else 1.0 for each in self.sizes}
        return self.seconds * shares[size] / (sum(shares.values()) * len(self.threads) * len(self.dtypes))


@click.command()
@click.option("--device", "device_name", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--size", "sizes", type=float, multiple=True, help="Size of a buffer, MiB; may be a fraction; repeat.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Type of elements; repeat.")
@click.option("--segments", type=click.IntRange(min=1), default=200, show_default=True, help="Segments of a buffer.")
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="Threads on the CPU; repeat.")
@click.option("--seconds", type=float, help="Time to measure in all, checks excluded.")
@click.option("--compile/--no-compile", "with_compile", default=True, help="Measure torch.compile, too.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="File for a picture.")
@quick_option
@json_option
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
    """Measure the statistics against the memory-read limit and their peers."""
    device = DEVICES[device_name]
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
            min_rounds=QUICK_MIN_ROUNDS if quick else MIN_ROUNDS,
            with_compile=with_compile,
            with_many=not quick,
        )
        run = run_all(device, options, make_console())
    except (Unusable, plot.MissingPlotting) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except WrongResult as error:
        raise click.ClickException(f"wrong result, so nothing was timed: {error}") from error
    if json_path is not None:
        json_path.write_text(json.dumps(run.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if plot_path is not None:
        plot.draw(run, plot_path)


def run_all(device: Device, options: Options, console: Console) -> Run:
    """Measures and prints everything."""
    machine = device.prepare()
    run = Run(machine[device.fact], device.limit, machine, vars(options).copy())
    print_header(console, run, device.time)
    for size, threads in itertools.product(_fitting_sizes(device, options, run), options.threads):
        samples = [
            sample for dtype in options.dtypes for sample in _measure_buffer(device, options, size, dtype, threads, run)
        ]
        print_samples(console, samples)
        run.samples += samples
    for threads in options.threads if options.with_many else ():
        samples = _measure_many(device, options, threads)
        print_samples(console, samples)
        run.samples += samples
    run.targets = device.targets(run)
    print_targets(console, run)
    return run


def _fitting_sizes(device: Device, options: Options, run: Run) -> list[int]:
    """The sizes that fit into memory. Adds to the run what is left out."""
    shortages = {size: device.shortage(size, options.segments) for size in options.sizes}
    too_large = {size_label(size): reason for size, reason in shortages.items() if reason is not None}
    if len(too_large) == len(shortages):
        raise Unusable("; ".join(f"{size} {reason}" for size, reason in too_large.items()))
    run.skipped.update(too_large)
    return [size for size, reason in shortages.items() if reason is None]


def _measure_buffer(
    device: Device, options: Options, size: int, dtype: str, threads: int | None, run: Run
) -> list[Sample]:
    """Measures everything on one buffer. Adds to the run what is left out."""
    _use_threads(threads)
    problem = make_problem(size, dtype, options.segments, device.torch_device)
    made = device.candidates(problem, options.with_compile)
    run.skipped.update({key: reason for key, reason in made.items() if isinstance(reason, str)})
    candidates = [candidate for candidate in made.values() if isinstance(candidate, Candidate)]
    return _samples(device, problem, threads, candidates, options.effort(options.seconds_for(size)))


def _measure_many(device: Device, options: Options, threads: int | None) -> list[Sample]:
    """Measures many small segments against one of the same bytes."""
    _use_threads(threads)
    problem = make_problem(MANY_SEGMENTS * MANY_SEGMENT_BYTES, "fp32", MANY_SEGMENTS, device.torch_device)
    known = public(problem)
    candidates = [
        replace(known[PUBLIC], key=MANY, label="ours: tensor_stats, 10,000 segments of 8 KiB"),
        replace(known[PUBLIC_ONE], key=MANY_ONE, label="ours: tensor_stats, one segment"),
    ]
    return _samples(device, problem, threads, candidates, options.effort(MANY_SECONDS))


def _use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


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


if __name__ == "__main__":
    main()
