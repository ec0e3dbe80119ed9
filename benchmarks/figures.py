"""What a run of the overhead benchmark found, its tables, and the targets that it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from candidates import AMINMAX, AMINMAX_PER_SEGMENT, ISFINITE, NATIVE, PUBLIC, PUBLIC_ONE, Candidate
from output import KIB, MIB, print_facts, print_table, size_label
from page import Table
from rich.console import Console
from rich.markup import escape
from timing import Series, percentiles

MANY_SEGMENTS, MANY_SEGMENT_BYTES = 10_000, 8 * KIB

_MAX_NORM_ERROR = 0.01  # relative; beyond it a norm is named as inaccurate. bfloat16 itself resolves 0.004
_COLUMNS = {
    "{dtype} us": "{median_us:,.2f}",
    "{dtype} of limit": "{fraction:#.2g}",
    "{dtype} ours x": "{speedup:,.2f}",
}
_TABLE = Table("overhead", "{label}", _COLUMNS)
_GPU_TABLE = Table("overhead", "{label}", {**_COLUMNS, "{dtype} host us": "{host_us:,.2f}"})
_MET = {True: "met", False: "missed", None: "not measured"}


@dataclass(frozen=True)
class Setting:
    """What the samples of one measurement share.

    Attributes:
        size: Bytes of the buffer.
        threads: Threads of torch; None on a GPU.
        dtype: Elements, such as "fp32".
        segments: Segments of the buffer; candidates that take it whole do not see them.
    """

    size: int
    threads: int | None
    dtype: str
    segments: int

    def __str__(self) -> str:
        return ", ".join([size_label(self.size), self.conditions])

    @property
    def conditions(self) -> str:
        """Dtype and number of threads, in words."""
        return ", ".join([self.dtype, *threads_label(self.threads)])


@dataclass(frozen=True)
class Sample(Setting):
    """One candidate on one buffer.

    Attributes:
        candidate: Key of the candidate.
        label: Name of the candidate.
        kind: Kind of the candidate.
        rounds: Number of measurements.
        repeats: Calls in each.
        median_us: Microseconds of a call's work.
        p20_us: 20th percentile of the same.
        p80_us: 80th percentile of the same.
        host_us: Microseconds until a call returns, median; None where it returns with its work done.
        fraction: Part of the read limit: 1 is as fast as reading the memory.
        speedup: How many times as fast our public call is; None if it was not measured.
        norm_error: Largest relative error of a norm, of a segment or of all; None if there is no norm.
    """

    candidate: str
    label: str
    kind: str
    rounds: int
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    host_us: float | None
    fraction: float
    speedup: float | None
    norm_error: float | None


@dataclass(frozen=True)
class Target:
    """A figure that is wanted.

    Attributes:
        promise: What is wanted.
        figure: What the run found, "-" if it was not measured.
        met: Whether it holds; None if it was not measured.
    """

    promise: str
    figure: str
    met: bool | None


@dataclass
class Run:
    """All that a run found.

    Attributes:
        device: What did the work, as its maker calls it.
        limit: What a fraction of 1 stands for.
        machine: All that is known of it and of the software.
        options: How much was asked for.
        samples: One for each candidate on each buffer.
        skipped: Why something was left out, by name.
        targets: Comparison with the targets.
    """

    device: str
    limit: str
    machine: dict[str, str]
    options: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def find(
        self, candidate: str, size: int | None = None, dtype: str | None = None, threads: int | None = None
    ) -> list[Sample]:
        """Returns the samples of a candidate that match what is given."""
        return [
            sample
            for sample in self.samples
            if sample.candidate == candidate
            and size in (None, sample.size)
            and dtype in (None, sample.dtype)
            and threads in (None, sample.threads)
        ]


def samples_of(
    setting: Setting, candidates: Sequence[Candidate], series: dict[str, Series], norm_errors: dict[str, float]
) -> list[Sample]:
    """Turns what was timed into samples. The fastest pass of all limits is the limit, fraction 1."""
    fractions = {key: statistics.median(found.fractions) for key, found in series.items()}
    limit = max(one.passes * fractions[one.key] for one in candidates if one.kind == "limit")
    public = fractions.get(PUBLIC)
    samples = []
    for candidate in candidates:
        found = series[candidate.key]
        low, middle, high = percentiles(found.nanoseconds)
        fraction = fractions[candidate.key]
        samples.append(
            Sample(
                **vars(setting),
                candidate=candidate.key,
                label=candidate.label,
                kind=candidate.kind,
                rounds=len(found.nanoseconds),
                repeats=found.repeats,
                median_us=middle / 1e3,
                p20_us=low / 1e3,
                p80_us=high / 1e3,
                host_us=statistics.median(found.host) / 1e3 if found.host else None,
                fraction=fraction / limit,
                speedup=public / fraction if public is not None else None,
                norm_error=norm_errors.get(candidate.key),
            )
        )
    return samples


# Targets


def cpu_targets(run: Run) -> list[Target]:
    """Compares a run on the CPU with the targets."""
    many = "10,000 segments of 8 KiB: within 1.3x of one segment"
    isfinite = "never slower than isfinite.all from 4 KiB on"
    return [
        *_fractions(run, (PUBLIC, NATIVE), 256 * MIB, {"fp32": 0.95, "bf16": 0.95, "fp16": 0.95}),
        *_fractions(run, (NATIVE,), 4 * MIB, {"fp32": 0.85, "bf16": 0.80, "fp16": 0.45}, threads=1),
        _slowest(run, many, PUBLIC, PUBLIC_ONE, least=1 / 1.3, segments=MANY_SEGMENTS),
        _slowest(run, f"{isfinite}, as one segment", PUBLIC_ONE, ISFINITE, min_size=4 * KIB),
        _slowest(run, f"{isfinite}, with all segments", PUBLIC, ISFINITE, min_size=4 * KIB),
        _longest(run, "4 KiB: public call below 20 microseconds", PUBLIC, 4 * KIB, 20.0),
    ]


def gpu_targets(run: Run) -> list[Target]:
    """Compares a run on a GPU with the targets."""
    foreach = "aminmax + _foreach_norm, on all segments"
    host = f"host time of a public call never above that of {foreach}"
    return [
        *_fractions(run, (PUBLIC,), 256 * MIB, {"fp32": 0.9, "bf16": 0.9, "fp16": 0.9}),
        _slowest(run, f"never slower than {foreach}", PUBLIC, AMINMAX_PER_SEGMENT),
        _slowest(run, "never slower than aminmax + vector_norm, on one segment", PUBLIC_ONE, AMINMAX),
        _slowest(run, host, PUBLIC, AMINMAX_PER_SEGMENT, speed=lambda sample: 1 / (sample.host_us or 1)),
    ]


def _fractions(
    run: Run, keys: Sequence[str], size: int, wanted: Mapping[str, float], threads: int | None = None
) -> list[Target]:
    """Targets for the fastest of `keys`, for each dtype and number of threads."""
    found = []
    for dtype, least in wanted.items():
        promise = f"{size_label(size)}: at least {least:.2f} of the limit"
        samples = [sample for key in keys for sample in run.find(key, size, dtype, threads)]
        if not samples:
            found.append(Target(f"{promise} ({dtype})", "-", None))
        for conditions in dict.fromkeys(sample.conditions for sample in samples):
            fraction = max(sample.fraction for sample in samples if sample.conditions == conditions)
            found.append(Target(f"{promise} ({conditions})", f"{fraction:.2f}", fraction >= least))
    return found


def _slowest(
    run: Run,
    promise: str,
    ours: str,
    other: str,
    least: float = 1.0,
    min_size: int = 0,
    segments: int | None = None,
    speed: Callable[[Sample], float] = lambda sample: sample.fraction,
) -> Target:
    """A target for the lowest ratio of our speed to another's under the same conditions."""
    ratios = [
        (speed(sample) / speed(peer), str(sample))
        for sample in run.find(ours)
        for peer in run.find(other, sample.size, sample.dtype, sample.threads)
        if sample.size >= min_size and segments in (None, sample.segments)
    ]
    if not ratios:
        return Target(promise, "-", None)
    ratio, where = min(ratios)
    return Target(promise, f"{ratio:.2f}x as fast at worst ({where})", ratio >= least)


def _longest(run: Run, promise: str, key: str, size: int, most: float) -> Target:
    """A target for the microseconds of a call."""
    times = [(sample.median_us, f"{sample.dtype}, {sample.segments} segments") for sample in run.find(key, size=size)]
    if not times:
        return Target(promise, "-", None)
    longest, where = max(times)
    return Target(promise, f"{longest:.1f} at worst ({where})", longest < most)


# Tables


def print_header(console: Console, run: Run, time: str) -> None:
    """Prints the machine and what the columns mean; `time` says how calls are timed."""
    print_facts(console, run.machine)
    console.print(
        f"{time} of limit: {run.limit}, over the time of the candidate. "
        "ours x: how many times as fast our tensor_stats is. "
        "All are medians over rounds in which the candidates take turns.",
        style="dim",
    )


def print_samples(console: Console, samples: Sequence[Sample]) -> None:
    """Prints the samples of one size and number of threads: a row each, 3 or 4 columns a dtype."""
    first = samples[0]
    title = ", ".join([size_label(first.size), *threads_label(first.threads), f"{first.segments:,} segments"])
    table = _TABLE if first.host_us is None else _GPU_TABLE
    headings, *rows = table.lines(map(asdict, samples))
    print_table(console, title, headings, rows)
    for sample in samples:
        if sample.norm_error is not None and sample.norm_error > _MAX_NORM_ERROR:
            console.print(f"norm off by {sample.norm_error:.1%}: {escape(sample.label)}, {sample.dtype}")


def print_targets(console: Console, run: Run) -> None:
    """Prints what was left out, and the targets."""
    for name, reason in run.skipped.items():
        console.print(f"[yellow]left out[/yellow]: {escape(name)}: {escape(reason)}")
    rows = [[target.promise, target.figure, _MET[target.met]] for target in run.targets]
    print_table(console, "Targets", ["promise", "found", ""], rows)


def threads_label(count: int | None) -> list[str]:
    """Returns a number of threads as people write it, or nothing if there is none."""
    if count is None:
        return []
    return ["1 thread" if count == 1 else f"{count} threads"]
