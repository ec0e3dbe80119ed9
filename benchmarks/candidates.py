"""What is measured: the read limit and ours. The peers are in peers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from problem import Problem
from timing import Call

import hallo_numguard as ng
from hallo_numguard.ops import native
from hallo_numguard.ops.formats import FORMATS

READ = "read"
READ_PREFETCHED = "read_prefetched"
NATIVE = "ours_native"
PUBLIC = "ours_public"
PUBLIC_ONE = "ours_public_one_segment"


@dataclass(frozen=True)
class Claims:
    """What a result says, None where it does not. One entry a segment, or one for all.

    Attributes:
        bad: Whether anything is not finite.
        nonfinite: Number of elements that are not.
        first: Index of the first of them inside the segment, or -1.
        absmax, norm: Of the elements.
        of_finite: Whether absmax and norm leave out what is not finite. If not, they say nothing
            where there is any.
    """

    bad: list[bool] | None = None
    nonfinite: list[int] | None = None
    first: list[int] | None = None
    absmax: list[float] | None = None
    norm: list[float] | None = None
    of_finite: bool = False


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        key: Its name in JSON.
        label: Its name in tables.
        kind: "limit", "ours" or "peer".
        call: Does the work.
        claims: Turns its result into what it says, outside of the timing.
    """

    key: str
    label: str
    kind: Literal["limit", "ours", "peer"]
    call: Call
    claims: Callable[[Any], Claims]


def read_call(problem: Problem, prefetch: bool) -> Call:
    """Returns the call that only reads the buffer, on as many threads as torch uses."""
    module = native.extension()
    if module is None:
        raise RuntimeError("the native extension is missing")
    address, threads = problem.flat.data_ptr(), torch.get_num_threads()
    return partial(module.read_memory, address, problem.bytes, prefetch, native.isa(), threads)


def read_limits(problem: Problem) -> list[Candidate]:
    """Returns the two ways to read the buffer; the faster is the limit."""
    return [
        Candidate(READ, "memory read", "limit", read_call(problem, False), _nothing),
        Candidate(
            READ_PREFETCHED,
            "memory read, prefetching",
            "limit",
            read_call(problem, True),
            _nothing,
        ),
    ]


def ours(problem: Problem) -> list[Candidate]:
    """Returns our own entries."""
    flat, layout, views = problem.flat, problem.layout, problem.views

    def candidate(key: str, label: str, call: Call) -> Candidate:
        return Candidate(key, label, "ours", call, _table_claims)

    return [
        Candidate(NATIVE, "ours: native entry", "ours", *_native_entry(problem)),
        candidate(PUBLIC, "ours: tensor_stats", partial(ng.tensor_stats, flat, layout)),
        candidate(
            "ours_public_detail",
            "ours: tensor_stats, detail",
            partial(ng.tensor_stats, flat, layout, detail=True),
        ),
        candidate(PUBLIC_ONE, "ours: tensor_stats, one segment", partial(ng.tensor_stats, flat)),
        candidate(
            "ours_list",
            "ours: multi_tensor_stats, list",
            partial(ng.multi_tensor_stats, views),
        ),
    ]


def _native_entry(problem: Problem) -> tuple[Call, Callable[[Any], Claims]]:
    """What the public call does, without the operator, the allocation and the checks."""
    module = native.extension()
    if module is None:
        raise RuntimeError("the native extension is missing")
    packed = torch.empty((problem.layout.segments, 8), dtype=torch.int64)
    plan = module.Plan(problem.layout.offsets.tolist())
    call = partial(
        module.scan_flat,
        packed.data_ptr(),
        problem.flat.data_ptr(),
        plan,
        FORMATS[problem.flat.dtype].code,
        False,
        native.isa(),
        torch.get_num_threads(),
    )
    return call, lambda _: _table_claims(ng.StatsTable(packed, detail=False))


def _table_claims(table: ng.StatsTable) -> Claims:
    records = table.to_host()
    return Claims(
        bad=[record.first_nonfinite >= 0 for record in records],
        nonfinite=[record.nonfinite for record in records],
        first=[record.first_nonfinite for record in records] if len(records) > 1 else None,
        absmax=[record.absmax for record in records],
        norm=[record.sumsq**0.5 for record in records],
        of_finite=True,
    )


def _nothing(_: Any) -> Claims:
    return Claims()
