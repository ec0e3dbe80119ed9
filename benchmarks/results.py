"""What a run found: one entry a candidate, and the targets it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from candidates import NATIVE, PUBLIC, PUBLIC_ONE, READ, READ_PREFETCHED, Candidate
from peers import ISFINITE
from timing import Series, percentiles
from verify import Checked

KIB, MIB = 1 << 10, 1 << 20
MANY, MANY_ONE = "many_segments", "many_segments_as_one"

_LARGE = 256 * MIB
_LARGE_FRACTION = 0.95
_CACHED = 4 * MIB
_CACHED_FRACTIONS = {"fp32": 0.85, "bf16": 0.80, "fp16": 0.45}
_MANY_RATIO = 1.3
_SMALL = 4 * KIB
_SMALL_MICROSECONDS = 20.0


@dataclass(frozen=True)
class Sample:
    """One candidate on one buffer.

    Attributes:
        candidate, label, kind: As in `candidates.Candidate`.
        size: Bytes.
        dtype: Such as "fp32".
        threads: As torch was told.
        segments: Of the buffer; flat candidates do not see them.
        rounds: Number of measurements.
        repeats: Calls in each.
        median_us, p20_us, p80_us: Microseconds of a call.
        fraction, fraction_p20, fraction_p80: Of the read limit: 1 is as fast as reading the memory.
        speedup: How many times as fast our public call is.
        norm_error: Largest relative error of a norm, of a segment or of all; None if it gives none.
    """

    candidate: str
    label: str
    kind: str
    size: int
    dtype: str
    threads: int
    segments: int
    rounds: int
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    fraction: float
    fraction_p20: float
    fraction_p80: float
    speedup: float | None
    norm_error: float | None


@dataclass(frozen=True)
class Target:
    """Something that was promised.

    Attributes:
        promise: What.
        figure: What the run found, or that it did not look.
        met: Whether it holds; None if the run did not look.
    """

    promise: str
    figure: str
    met: bool | None


@dataclass
class Run:
    """All that a run found."""

    machine: dict[str, str]
    options: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def find(
        self,
        candidate: str,
        size: int | None = None,
        dtype: str | None = None,
        threads: int | None = None,
    ) -> list[Sample]:
        """Returns the samples of a candidate, those that match what is given."""
        return [
            sample
            for sample in self.samples
            if sample.candidate == candidate
            and size in (None, sample.size)
            and dtype in (None, sample.dtype)
            and threads in (None, sample.threads)
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What the samples of one measurement share."""

    size: int
    dtype: str
    threads: int
    segments: int


def samples_of(
    setting: Setting, candidates: Sequence[Candidate], series: dict[str, Series], checked: Checked
) -> list[Sample]:
    """Turns what was timed into samples. The faster of the two reads is the limit, fraction 1."""
    fractions = {key: percentiles(found.fractions) for key, found in series.items()}
    limit = max(fractions[key][1] for key in (READ, READ_PREFETCHED) if key in fractions)
    public = fractions[PUBLIC][1] if PUBLIC in fractions else None
    samples = []
    for candidate in candidates:
        found = series[candidate.key]
        low, middle, high = percentiles(found.nanoseconds)
        slowest, fraction, fastest = fractions[candidate.key]
        samples.append(
            Sample(
                candidate=candidate.key,
                label=candidate.label,
                kind=candidate.kind,
                size=setting.size,
                dtype=setting.dtype,
                threads=setting.threads,
                segments=setting.segments,
                rounds=len(found.nanoseconds),
                repeats=found.repeats,
                median_us=middle / 1e3,
                p20_us=low / 1e3,
                p80_us=high / 1e3,
                fraction=fraction / limit,
                fraction_p20=slowest / limit,
                fraction_p80=fastest / limit,
                speedup=public / fraction if public is not None else None,
                norm_error=checked.norm_errors.get(candidate.key),
            )
        )
    return samples


def targets(run: Run) -> list[Target]:
    """Holds a run against what was promised."""
    return [
        *_large_targets(run),
        *_cached_targets(run),
        *_many_targets(run),
        *_isfinite_targets(run),
        *_small_targets(run),
    ]


def size_label(size: int) -> str:
    """Returns a size as people write it."""
    unit, name = (MIB, "MiB") if size >= MIB else (KIB, "KiB")
    return f"{size / unit:g} {name}"


def threads_label(count: int) -> str:
    """Returns a number of threads as people write it."""
    return "1 thread" if count == 1 else f"{count} threads"


def _large_targets(run: Run) -> list[Target]:
    promise = f"{size_label(_LARGE)}: at least {_LARGE_FRACTION} of the read limit"
    found = []
    for public in run.find(PUBLIC, size=_LARGE):
        native = run.find(NATIVE, _LARGE, public.dtype, public.threads)
        fraction = max(sample.fraction for sample in [public, *native])
        where = f"{promise} ({public.dtype}, {threads_label(public.threads)})"
        found.append(Target(where, f"{fraction:.2f}", fraction >= _LARGE_FRACTION))
    return found or [_unknown(promise)]


def _cached_targets(run: Run) -> list[Target]:
    found = []
    for dtype, wanted in _CACHED_FRACTIONS.items():
        promise = (
            f"{size_label(_CACHED)}: native entry at least {wanted:.2f} of the read limit ({dtype}, {threads_label(1)})"
        )
        samples = run.find(NATIVE, _CACHED, dtype, threads=1)
        if samples:
            fraction = samples[0].fraction
            found.append(Target(promise, f"{fraction:.2f}", fraction >= wanted))
        else:
            found.append(_unknown(promise))
    return found


def _many_targets(run: Run) -> list[Target]:
    promise = f"10,000 segments of 8 KiB: within {_MANY_RATIO}x of one segment"
    found = []
    for many in run.find(MANY):
        one = run.find(MANY_ONE, many.size, many.dtype, many.threads)[0]
        ratio = one.fraction / many.fraction
        where = f"{promise} ({many.dtype}, {threads_label(many.threads)})"
        found.append(Target(where, f"{ratio:.2f}x", ratio <= _MANY_RATIO))
    return found or [_unknown(promise)]


def _isfinite_targets(run: Run) -> list[Target]:
    """As one segment it does the work of isfinite.all; beside it, what all the segments cost."""
    found = []
    for key, which in ((PUBLIC_ONE, "as one segment"), (PUBLIC, "with all segments")):
        promise = f"never slower than isfinite.all from {size_label(_SMALL)} on, {which}"
        ratios = [
            (sample.fraction / peer.fraction, sample)
            for sample in run.find(key)
            for peer in run.find(ISFINITE, sample.size, sample.dtype, sample.threads)
            if sample.size >= _SMALL
        ]
        if not ratios:
            found.append(_unknown(promise))
            continue
        ratio, worst = min(ratios, key=lambda pair: pair[0])
        where = f"{size_label(worst.size)}, {worst.dtype}, {threads_label(worst.threads)}"
        found.append(Target(promise, f"{ratio:.2f}x as fast at worst ({where})", ratio >= 1))
    return found


def _small_targets(run: Run) -> list[Target]:
    promise = f"{size_label(_SMALL)}: public call below {_SMALL_MICROSECONDS:g} microseconds"
    samples = run.find(PUBLIC, size=_SMALL)
    if not samples:
        return [_unknown(promise)]
    worst = max(samples, key=lambda sample: sample.median_us)
    figure = f"{worst.median_us:.1f} at worst ({worst.dtype}, {worst.segments} segments)"
    return [Target(promise, figure, worst.median_us < _SMALL_MICROSECONDS)]


def _unknown(promise: str) -> Target:
    return Target(promise, "not measured", None)
