"""What a run found: one entry a candidate. What it is held against is in targets.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from candidates import PUBLIC, Candidate
from timing import Series, percentiles

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MANY, MANY_ONE = "many_segments", "many_segments_as_one"

_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))


@dataclass(frozen=True)
class Sample:
    """One candidate on one buffer.

    Attributes:
        candidate, label, kind: As in `candidates.Candidate`.
        size: Bytes.
        dtype: Such as "fp32".
        threads: As torch was told; None on a GPU.
        segments: Of the buffer; flat candidates do not see them.
        rounds: Number of measurements.
        repeats: Calls in each.
        median_us, p20_us, p80_us: Microseconds of a call's work.
        host_us: Microseconds until a call returns, median; None where it returns with its work done.
        fraction, fraction_p20, fraction_p80: Of the read limit: 1 is as fast as reading the memory.
        speedup: How many times as fast our public call is.
        norm_error: Largest relative error of a norm, of a segment or of all; None if it gives none.
    """

    candidate: str
    label: str
    kind: str
    size: int
    dtype: str
    threads: int | None
    segments: int
    rounds: int
    repeats: int
    median_us: float
    p20_us: float
    p80_us: float
    host_us: float | None
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
        figure: What the run found, "-" if it did not look.
        met: Whether it holds; None if the run did not look.
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
        options: What was asked for.
        samples, targets: What came of it.
        skipped: What was left out, and why.
    """

    device: str
    limit: str
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
    threads: int | None
    segments: int


def samples_of(
    setting: Setting, candidates: Sequence[Candidate], series: dict[str, Series], norm_errors: dict[str, float]
) -> list[Sample]:
    """Turns what was timed into samples. The fastest pass of all limits is the limit, fraction 1."""
    fractions = {key: percentiles(found.fractions) for key, found in series.items()}
    limits = [candidate for candidate in candidates if candidate.kind == "limit"]
    limit = max(candidate.passes * fractions[candidate.key][1] for candidate in limits)
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
                host_us=statistics.median(found.host) / 1e3 if found.host else None,
                fraction=fraction / limit,
                fraction_p20=slowest / limit,
                fraction_p80=fastest / limit,
                speedup=public / fraction if public is not None else None,
                norm_error=norm_errors.get(candidate.key),
            )
        )
    return samples


def size_label(size: int) -> str:
    """Returns a size as people write it."""
    unit, name = next((unit, name) for unit, name in _UNITS if size >= unit or unit == KIB)
    return f"{size / unit:g} {name}"


def join(*parts: str | None) -> str:
    """Returns the parts that there are, as one line."""
    return ", ".join(part for part in parts if part is not None)


def threads_label(count: int | None) -> str | None:
    """Returns a number of threads as people write it, or None if there is none."""
    if count is None:
        return None
    return "1 thread" if count == 1 else f"{count} threads"
