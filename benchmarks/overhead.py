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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import plot
import torch
from candidates import Candidate
from devices import DEVICES, Device, Unusable
from figures import (
    MANY_SEGMENT_BYTES,
    MANY_SEGMENTS,
    Run,
    Sample,
    Setting,
    print_header,
    print_samples,
    print_targets,
    samples_of,
)
from output import MIB, json_option, make_console, quick_option, size_label
from problems import DTYPES, make_problem
from rich.console import Console
from timing import measure
from verify import WrongResult, check

DTYPE_NAMES = ("fp32", "bf16", "fp16")
QUICK_DTYPE_NAMES = ("fp32", "bf16")
SECONDS, QUICK_SECONDS = 100.0, 6.0
MIN_ROUNDS, QUICK_MIN_ROUNDS = 15, 3

LARGE_BYTES = 32 * MIB
LARGE_SHARE = 5.0  # time for a larger size, over that for a smaller one


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        settings: Buffers, in the order of the tables.
        seconds: Time to measure in all, checks excluded.
        min_rounds: Fewest rounds.
        with_compile: Whether torch.compile is measured.
        aligned: Whether segments begin at cache lines.
    """

    settings: Sequence[Setting]
    seconds: float
    min_rounds: int
    with_compile: bool
    aligned: bool

    def seconds_for(self, setting: Setting) -> float:
        """Returns the part of the time for one buffer."""
        shares = [LARGE_SHARE if each.size > LARGE_BYTES else 1.0 for each in self.settings]
        return self.seconds * shares[self.settings.index(setting)] / sum(shares)


@click.command()
@click.option("--device", "device_name", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--size", "sizes", type=float, multiple=True, help="Size of a buffer, MiB; may be a fraction; repeat.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Type of elements; repeat.")
@click.option("--segments", type=click.IntRange(min=1), default=200, show_default=True, help="Segments of a buffer.")
@click.option("--aligned", is_flag=True, help="Segments begin at cache lines, in place of any element.")
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
    aligned: bool,
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
        dtypes = dtypes or (QUICK_DTYPE_NAMES if quick else DTYPE_NAMES)
        byte_sizes = [max(1, round(size * MIB)) for size in sizes] or (device.quick_sizes if quick else device.sizes)
        counts = device.thread_counts(threads, quick)
        settings = [Setting(*each, segments) for each in itertools.product(byte_sizes, counts, dtypes)]
        if not quick:
            settings += [Setting(MANY_SEGMENTS * MANY_SEGMENT_BYTES, count, "fp32", MANY_SEGMENTS) for count in counts]
        seconds = seconds if seconds is not None else (QUICK_SECONDS if quick else SECONDS)
        options = Options(settings, seconds, QUICK_MIN_ROUNDS if quick else MIN_ROUNDS, with_compile, aligned)
        run = run_all(device, options, make_console(), lambda run: _write(json_path, run))
    except (Unusable, plot.MissingPlotting) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except WrongResult as error:
        raise click.ClickException(f"wrong result, so nothing was timed: {error}") from error
    if plot_path is not None:
        plot.draw(run, plot_path)


def _write(path: Path | None, run: Run) -> None:
    if path is not None:
        path.write_text(json.dumps(asdict(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run_all(device: Device, options: Options, console: Console, keep: Callable[[Run], None]) -> Run:
    """Measures and prints everything; `keep` is called after each size: a run that is cut off leaves what it has."""
    machine = device.prepare()
    asked = {"seconds": options.seconds, "min_rounds": options.min_rounds, "aligned": options.aligned}
    run = Run(machine[device.fact], device.limit, machine, asked)
    print_header(console, run, device.time)
    shortages = {setting: device.shortage(setting.size, setting.segments) for setting in options.settings}
    run.skipped.update(
        {size_label(setting.size): reason for setting, reason in shortages.items() if reason is not None}
    )
    settings = [setting for setting, reason in shortages.items() if reason is None]
    if not settings:
        raise Unusable("; ".join(f"{size} {reason}" for size, reason in run.skipped.items()))
    for _, group in itertools.groupby(settings, lambda setting: (setting.size, setting.threads)):
        samples = [sample for setting in group for sample in _measure_buffer(device, options, setting, run)]
        print_samples(console, samples)
        run.samples += samples
        keep(run)
    run.targets = device.targets(run)
    keep(run)
    print_targets(console, run)
    return run


def _measure_buffer(device: Device, options: Options, setting: Setting, run: Run) -> list[Sample]:
    """Measures everything on one buffer. Adds to the run what is left out."""
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    problem = make_problem(setting.size, setting.dtype, setting.segments, device.torch_device, options.aligned)
    made = device.candidates(problem, options.with_compile)
    run.skipped.update({key: reason for key, reason in made.items() if isinstance(reason, str)})
    limits = device.limits(problem)
    candidates = [*limits, *(candidate for candidate in made.values() if isinstance(candidate, Candidate))]
    norm_errors = check(problem, candidates)
    calls = {candidate.key: candidate.call for candidate in candidates}
    seconds = options.seconds_for(setting)
    series = measure(
        device.clock(problem),
        limits[0].call,
        calls,
        seconds,
        options.min_rounds,
        is_undivided=device.is_undivided(),
    )
    measured = replace(setting, size=problem.bytes, segments=problem.layout.segments)
    return samples_of(measured, candidates, series, norm_errors)


if __name__ == "__main__":
    main()
