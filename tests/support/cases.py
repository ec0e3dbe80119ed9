"""The inputs that every backend is tested on: dtypes, layouts, planted values and extremes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hallo_numguard.core.records import Record
from hallo_numguard.ops.formats import FORMATS, Format

PADDING = 7  # elements behind the last segment, which no backend may look at

LAYOUTS = {
    "one_segment": (0, 1000),
    "ragged": (0, 0, 1, 1, 4, 5, 100, 1124, 3300, 3300),
    "unaligned": (3, 10, 77, 1100, 2177, 5999),
    "long": (1, 70_001),
    "tiny": tuple(itertools.accumulate((size % 5 for size in range(25)), initial=2)),
}

# What is planted where in every segment.
PLANTS = {
    "clean": (),
    "nan": (("middle", "nan"),),
    "negative_nan": (("middle", "-nan"),),
    "signalling_nan": (("middle", "snan"),),
    "pos_inf": (("middle", "inf"),),
    "neg_inf": (("middle", "-inf"),),
    "first": (("first", "nan"),),
    "last": (("last", "inf"),),
    "mixed": (("first", "-inf"), ("middle", "nan"), ("last", "inf")),
    "all_nan": (("all", "nan"),),
}


@dataclass(frozen=True)
class Case:
    """One flat tensor and its segments."""

    dtype: torch.dtype
    layout: str
    values: str
    plant: str

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}-{self.layout}-{self.values}-{self.plant}"

    @property
    def offsets(self) -> list[int]:
        return list(LAYOUTS[self.layout])


@functools.cache
def flat_of(case: Case) -> torch.Tensor:
    """The flat tensor of a case. Shared: not to be written to."""
    offsets = case.offsets
    generator = torch.Generator().manual_seed(42)
    flat = VALUES[case.values](case.dtype, offsets[-1] + PADDING, generator).to(case.dtype)
    spec = FORMATS[case.dtype]
    bits = flat.view(spec.bits)
    for begin, end in itertools.pairwise(offsets):
        if begin < end:
            places = {"first": begin, "middle": (begin + end) // 2, "last": end - 1}
            for where, what in PLANTS[case.plant]:
                at = slice(begin, end) if where == "all" else places[where]
                bits[at] = planted_bits(spec)[what]
    bits[: offsets[0]] = planted_bits(spec)["nan"]
    bits[offsets[-1] :] = planted_bits(spec)["-inf"]
    return flat


@functools.cache
def planted_bits(spec: Format) -> dict[str, int]:
    """Bit patterns, as signed integers. In e4m3fn the pattern of infinity is a number."""
    sign = -(1 << (spec.exponent + spec.mantissa))
    infinity = ((1 << spec.exponent) - 1) << spec.mantissa
    return {
        "nan": spec.magnitude_mask,
        "-nan": sign + spec.magnitude_mask,
        "snan": infinity + 1,
        "inf": infinity,
        "-inf": sign + infinity,
    }


@functools.cache
def expected_of(case: Case) -> tuple[Record, ...]:
    """The records by their definition, which share nothing with the package but the class."""
    flat = flat_of(case)
    return tuple(definition(flat[begin:end]) for begin, end in itertools.pairwise(case.offsets))


def definition(segment: torch.Tensor) -> Record:
    """The record of one segment; squares are exact, but those of float64, and so is their sum."""
    values = segment.double().reshape(-1).tolist()
    smallest_normal = torch.finfo(segment.dtype).smallest_normal
    finite = [abs(value) for value in values if math.isfinite(value)]
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    return Record(
        nan=sum(math.isnan(value) for value in values),
        pos_inf=values.count(math.inf),
        neg_inf=values.count(-math.inf),
        absmax=max(finite, default=0.0),
        sumsq=math.fsum(value * value for value in finite),
        first_nonfinite=bad[0] if bad else -1,
        zeros=finite.count(0.0),
        subnormals=sum(0.0 < value < smallest_normal for value in finite),
    )


def from_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of a dtype with these bits, of which the lowest count."""
    return bits.to(FORMATS[dtype].bits).view(dtype)


def _bits_of(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor([value], dtype=dtype).view(FORMATS[dtype].bits))


def _is_wide(dtype: torch.dtype) -> bool:
    return FORMATS[dtype].exponent >= 8


def _normal(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def _huge(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    largest = 1e20 if _is_wide(dtype) else torch.finfo(dtype).max
    return (1 - torch.rand(size, generator=generator) / 2) * largest


def _enormous(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator) * 1e30


def _largest(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((size,), torch.finfo(dtype).max, dtype=dtype)


def _small(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    scale = 1e-25 if _is_wide(dtype) else torch.finfo(dtype).smallest_normal
    return torch.randn(size, generator=generator) * scale


def _subnormal(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    end = FORMATS[dtype].smallest_normal
    return from_bits(torch.randint(1, end, (size,), generator=generator), dtype)


def _zeros(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(size).copysign(torch.randn(size, generator=generator))


def _constant(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((size,), 0.1)


def _lognormal(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    values = (torch.randn(size, generator=generator) * 4).exp().double()
    return values.clamp(max=torch.finfo(dtype).max)


def _around(limit: float, dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    nearby = torch.randint(-2, 3, (size,), generator=generator) + _bits_of(limit, dtype)
    return from_bits(nearby, dtype)


def _below_upper_limit(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    return from_bits(torch.full((size,), _bits_of(2.0**60, dtype) - 1), dtype)


def _squares_underflow(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    """Every thousandth element is at the lower limit; the squares of the others are subnormal."""
    values = from_bits(torch.full((size,), _bits_of(2.0**-63, dtype) - 1), dtype)
    values[::1000] = 2.0**-50
    return values


VALUES: dict[str, Callable[[torch.dtype, int, torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "huge": _huge,
    "enormous": _enormous,
    "largest": _largest,
    "small": _small,
    "subnormal": _subnormal,
    "zeros": _zeros,
    "constant": _constant,
    "lognormal": _lognormal,
    "around_upper_limit": functools.partial(_around, 2.0**60),
    "around_lower_limit": functools.partial(_around, 2.0**-50),
    "below_upper_limit": _below_upper_limit,
    "squares_underflow": _squares_underflow,
}

_ONLY_WIDE = {
    "enormous",
    "around_upper_limit",
    "around_lower_limit",
    "below_upper_limit",
    "squares_underflow",
}


def _cases_of(dtype: torch.dtype) -> list[Case]:
    cases = [Case(dtype, "ragged", "normal", plant) for plant in PLANTS]
    for layout in LAYOUTS:
        if layout != "ragged":
            cases += [Case(dtype, layout, "normal", plant) for plant in ("clean", "mixed")]
    for values in VALUES:
        if values == "normal" or (values in _ONLY_WIDE and not _is_wide(dtype)):
            continue
        if values == "largest" and dtype is torch.float64:
            continue  # its square is no float64
        cases.append(Case(dtype, "unaligned", values, "clean"))
    cases += [Case(dtype, "unaligned", values, "mixed") for values in ("huge", "subnormal")]
    cases += [Case(dtype, "long", values, "clean") for values in ("constant", "lognormal")]
    return cases


CASES = [case for dtype in FORMATS for case in _cases_of(dtype)]
