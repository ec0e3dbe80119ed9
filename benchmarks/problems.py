"""The buffer that all candidates work on, its expected statistics, and values planted into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

import hallo_numguard as ng

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

CACHE_LINE = 64  # bytes
_VALUE_SCALE = 1e-3  # gradients are small
_PATTERN_NUMEL = 1 << 22  # elements after which the values repeat
_PLANTED_ABSMAX = 96.0

_LIVE_BUFFERS = 6  # the buffer, its copy, and what the greediest peer has at a time
_LIVE_SEGMENTS = 10  # one segment as float64, squared


@dataclass(frozen=True)
class Problem:
    """One buffer, cut into segments.

    Attributes:
        dtype: Key of `DTYPES`.
        flat: The buffer. Shape [n].
        layout: Segments of the buffer.
        views: Views of the segments.
        spare: Copy of the buffer, for candidates that write. Shape [n].
        scratch: Views of the copy's segments.
    """

    dtype: str
    flat: torch.Tensor
    layout: ng.Layout
    views: list[torch.Tensor]
    spare: torch.Tensor
    scratch: list[torch.Tensor]

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return self.flat.numel() * self.flat.element_size()


@dataclass(frozen=True)
class Expected:
    """The statistics of one segment, or of all.

    Attributes:
        nonfinite: Number of NaN and infinities.
        first: Index of the first of them, or -1.
        absmax: Largest magnitude of the finite elements.
        norm: Euclidean norm of the finite elements.
    """

    nonfinite: int
    first: int
    absmax: float
    norm: float


def make_problem(size: int, dtype: str, segments: int, device: torch.device, aligned: bool = False) -> Problem:
    """Returns a buffer of `size` bytes in nearly equal segments; all devices get the same.

    Args:
        size: Bytes of the buffer.
        dtype: Key of `DTYPES`.
        segments: Number of segments.
        device: Device of the buffer.
        aligned: Whether segments begin at cache lines, in place of any element.
    """
    count = max(1, size // DTYPES[dtype].itemsize)
    step = CACHE_LINE // DTYPES[dtype].itemsize if aligned else 1
    segments = min(segments, count)
    pattern = torch.randn(min(count, _PATTERN_NUMEL), generator=torch.Generator().manual_seed(0))
    pattern = (pattern * _VALUE_SCALE).to(device, DTYPES[dtype])
    flat = torch.empty(count, dtype=DTYPES[dtype], device=device)
    for part in flat.split(pattern.numel()):
        part.copy_(pattern[: part.numel()])
    begins = [index * count // segments // step * step for index in range(segments)]
    layout = ng.Layout([*begins, count])
    spare = flat.clone()
    return Problem(dtype, flat, layout, _views(flat, layout), spare, _views(spare, layout))


def memory_needed(size: int, segments: int) -> int:
    """Returns about how many bytes a problem of `size` takes, temporaries included."""
    return _LIVE_BUFFERS * size + _LIVE_SEGMENTS * size // segments


def expected_of(problem: Problem) -> list[Expected]:
    """Returns the statistics of every segment, computed in float64."""
    return [_expected(view) for view in problem.views]


def together(parts: Sequence[Expected]) -> Expected:
    """Returns the statistics of all segments as one, but for the first index, which is -1 or 0."""
    return Expected(
        nonfinite=sum(part.nonfinite for part in parts),
        first=0 if any(part.nonfinite for part in parts) else -1,
        absmax=max(part.absmax for part in parts),
        norm=math.sqrt(math.fsum(part.norm**2 for part in parts)),
    )


@contextmanager
def planted(problem: Problem, known: Sequence[Expected]) -> Iterator[list[Expected]]:
    """Plants NaN, infinities and a large number, gives the statistics with them, and removes them.

    Args:
        problem: Buffer to change.
        known: Statistics without them.
    """
    last = problem.layout.segments - 1
    plants = [  # segment, how far inside it, value
        (0, 1.0, math.nan),
        (last // 3, 0.3, -_PLANTED_ABSMAX),
        (last // 2, 0.0, math.inf),
        (last // 2, 0.7, math.nan),
        (last, 0.5, -math.inf),
    ]
    touched = {segment for segment, _, _ in plants}
    saved = {segment: problem.views[segment].clone() for segment in touched}
    for segment, place, value in plants:
        index = int(place * (problem.views[segment].numel() - 1))
        problem.views[segment][index] = value
        problem.scratch[segment][index] = value
    changed = list(known)
    for segment in touched:
        changed[segment] = _expected(problem.views[segment])
    try:
        yield changed
    finally:
        for segment, values in saved.items():
            problem.views[segment].copy_(values)
            problem.scratch[segment].copy_(values)


def _views(flat: torch.Tensor, layout: ng.Layout) -> list[torch.Tensor]:
    offsets = layout.offsets.tolist()
    return [flat[begin:end] for begin, end in pairwise(offsets)]


def _expected(segment: torch.Tensor) -> Expected:
    bad = ~torch.isfinite(segment)
    nonfinite = int(bad.sum())
    values = segment.masked_fill(bad, 0).double()
    return Expected(
        nonfinite=nonfinite,
        first=int(bad.nonzero()[0]) if nonfinite else -1,
        absmax=float(values.abs().max()),
        norm=math.sqrt(float((values * values).sum())),
    )
