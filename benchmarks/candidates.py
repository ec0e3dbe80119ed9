"""What is measured, other than the peers: what sets the limit, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from problem import Problem
from timing import Call

import hallo_numguard as ng
from hallo_numguard.ops import dispatch, tensor_list
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.native_extension import extension

NATIVE = "ours_native"
PUBLIC = "ours_public"
PUBLIC_ONE = "ours_public_one_segment"

_GPU_BACKENDS = ("native", "triton")


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
        kind: "limit", "ours", "peer", or "hint": for information, held against nothing.
        call: Does the work.
        claims: Turns its result into what it says, outside of the timing.
        passes: Of a limit: how often it moves the bytes of the buffer. Reading them once takes that part of its time.
    """

    key: str
    label: str
    kind: Literal["limit", "ours", "peer", "hint"]
    call: Call
    claims: Callable[[Any], Claims]
    passes: int = 1


Made = Candidate | str  # a candidate, or why there is none


def sort_out(made: Mapping[str, Made]) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the candidates that run here, and by key why the others do not."""
    found = [candidate for candidate in made.values() if isinstance(candidate, Candidate)]
    return found, {key: reason for key, reason in made.items() if isinstance(reason, str)}


def memory_reads(problem: Problem) -> list[Candidate]:
    """Returns the two ways to read memory on the CPU, on as many threads as torch uses; the faster is the limit."""
    module = _native_module()
    arguments = (native.isa(), torch.get_num_threads())

    def read(prefetch: bool) -> Call:
        return partial(module.read_memory, problem.flat.data_ptr(), problem.bytes, prefetch, *arguments)

    return [
        Candidate("read", "memory read", "limit", read(False), _nothing),
        Candidate("read_prefetched", "memory read, prefetching", "limit", read(True), _nothing),
    ]


def copies(problem: Problem) -> list[Candidate]:
    """Returns the copy inside a GPU's memory, which sets its limit, and beside it a reduction that only reads."""
    words = _words(problem.flat)
    return [
        Candidate(
            "copy", "device-to-device copy", "limit", partial(problem.spare.copy_, problem.flat), _nothing, passes=2
        ),
        Candidate("sum_int32", "torch.sum as int32 (only reads)", "hint", partial(torch.sum, words), _nothing),
    ]


def public(problem: Problem) -> list[Candidate]:
    """Returns our public calls."""
    flat, layout, views = problem.flat, problem.layout, problem.views
    return [
        _ours(PUBLIC, "tensor_stats", partial(ng.tensor_stats, flat, layout)),
        _ours("ours_public_detail", "tensor_stats, detail", partial(ng.tensor_stats, flat, layout, detail=True)),
        _ours(PUBLIC_ONE, "tensor_stats, one segment", partial(ng.tensor_stats, flat)),
        _ours("ours_list", "multi_tensor_stats, list", partial(ng.multi_tensor_stats, views)),
    ]


def native_entry(problem: Problem) -> Candidate:
    """Returns what the public call does on the CPU, without the operator, the allocation and the checks."""
    module = _native_module()
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
    return Candidate(NATIVE, "ours: native entry", "ours", call, lambda _: _packed_claims(packed))


def gpu_backends(problem: Problem) -> dict[str, Made]:
    """Returns each backend of a GPU apart, without the operator and the checks, on the buffer and on the list."""
    flat, layout, views = problem.flat, problem.layout, problem.views
    made: dict[str, Made] = {}
    for name in _GPU_BACKENDS:
        backend = dispatch.backend(name, flat.device.type)
        reason = backend.unavailable(flat.device.type)
        if reason is not None:
            made[f"ours_{name}"] = reason
            continue
        scan = partial(backend.tensor_stats, flat, layout, False)
        scan_list = partial(_scan_list, backend, views)
        made[f"ours_{name}"] = _entry(f"ours_{name}", f"{name} entry", scan)
        made[f"ours_{name}_list"] = _entry(f"ours_{name}_list", f"{name} entry, list", scan_list)
    return made


def _native_module() -> ModuleType:
    module = extension()
    if module is None:
        raise RuntimeError("the native extension is missing")
    return module


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The buffer as integers of 4 bytes, but for a rest of less."""
    whole = flat.numel() * flat.element_size() // 4 * 4
    return flat[: whole // flat.element_size()].view(torch.int32)


def _scan_list(backend: dispatch.Backend, tensors: list[torch.Tensor]) -> torch.Tensor:
    return backend.multi_tensor_stats(tensor_list.read(tensors), False)


def _ours(key: str, label: str, call: Call) -> Candidate:
    return Candidate(key, f"ours: {label}", "ours", call, _table_claims)


def _entry(key: str, label: str, call: Call) -> Candidate:
    return Candidate(key, f"ours: {label}", "ours", call, _packed_claims)


def _packed_claims(packed: torch.Tensor) -> Claims:
    return _table_claims(ng.StatsTable(packed, detail=False))


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
