"""The registry of what is measured: what sets the limit, our own calls, and all else that does the work.

The views of the segments exist before the timing.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from problems import Problem
from timing import Call

import hallo_numguard as ng
from hallo_numguard.ops import dispatch, tensor_list
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.native_extension import extension

NATIVE = "ours_native"
PUBLIC = "ours_public"
PUBLIC_ONE = "ours_public_one_segment"
ISFINITE = "isfinite_all"
AMINMAX = "aminmax_norm"
AMINMAX_PER_SEGMENT = "aminmax_foreach_norm"

_GPU_BACKENDS = ("native", "triton")


@dataclass(frozen=True)
class Reported:
    """What a result says, None where it does not. One entry a segment, or one for all.

    Attributes:
        bad: Whether anything is not finite.
        nonfinite: Number of elements that are not finite.
        first: Index of the first of them inside the segment, or -1.
        absmax: Largest magnitude.
        norm: Euclidean norm.
        finite_only: Whether absmax and norm leave out what is not finite. If not, they say nothing where there is any.
    """

    bad: list[bool] | None = None
    nonfinite: list[int] | None = None
    first: list[int] | None = None
    absmax: list[float] | None = None
    norm: list[float] | None = None
    finite_only: bool = False


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        key: Name in JSON.
        label: Name in tables.
        kind: "limit", "ours", "peer", or "hint": for information, compared with nothing.
        call: Does the work.
        report: Turns a result into what it says, outside of the timing.
        passes: How often a limit moves the bytes of the buffer. Reading them once takes that part of its time.
    """

    key: str
    label: str
    kind: Literal["limit", "ours", "peer", "hint"]
    call: Call
    report: Callable[[Any], Reported] = lambda _: Reported()
    passes: int = 1


Candidates = Mapping[str, Candidate | str]  # by key: the candidate, or why there is none
Maker = Callable[[Problem], Candidate]


# What sets the limit


def memory_reads(problem: Problem) -> list[Candidate]:
    """Returns the ways to read memory on the CPU, on as many threads as torch uses; the fastest is the limit."""
    read, isas = _native_module().read_memory, native.isas()
    arguments, threads = (problem.flat.data_ptr(), problem.bytes), torch.get_num_threads()
    ways = [  # key, label, number of the way, instruction set
        ("read", "memory read", 0, native.isa()),
        ("read_prefetched", "memory read, prefetching", 1, native.isa()),
        ("read_in_turns", "memory read, four places in turns", 2, native.isa()),
    ]
    if "avx2" in isas:  # not slower where vectors of 512 bits are read in two halves
        ways.append(("read_avx2", "memory read, 256 bits", 0, isas.index("avx2")))
    return [
        Candidate(key, label, "limit", partial(read, *arguments, way, isa, threads)) for key, label, way, isa in ways
    ]


def copies(problem: Problem) -> list[Candidate]:
    """Returns the copy inside a GPU's memory, which sets its limit, and beside it a reduction that only reads."""
    flat = problem.flat
    whole_words = flat.numel() * flat.element_size() // 4 * 4
    words = flat[: whole_words // flat.element_size()].view(torch.int32)
    copy = partial(problem.spare.copy_, flat)
    return [
        Candidate("copy", "device-to-device copy", "limit", copy, passes=2),
        Candidate("sum_int32", "torch.sum as int32 (only reads)", "hint", partial(torch.sum, words)),
    ]


# Ours


def public(problem: Problem) -> dict[str, Candidate]:
    """Returns our public calls, by key."""
    flat, layout, views = problem.flat, problem.layout, problem.views
    made = [
        _ours(PUBLIC, "tensor_stats", partial(ng.tensor_stats, flat, layout)),
        _ours("ours_public_detail", "tensor_stats, detail", partial(ng.tensor_stats, flat, layout, detail=True)),
        _ours(PUBLIC_ONE, "tensor_stats, one segment", partial(ng.tensor_stats, flat)),
        _ours("ours_list", "multi_tensor_stats, list", partial(ng.multi_tensor_stats, views)),
    ]
    return {candidate.key: candidate for candidate in made}


def native_entry(problem: Problem) -> Candidate:
    """Returns what the public call does on the CPU, without the operator, the allocation and the checks."""
    module = _native_module()
    packed = torch.empty((problem.layout.segments, 8), dtype=torch.int64)
    call = partial(
        module.scan_flat,
        packed.data_ptr(),
        problem.flat.data_ptr(),
        module.Plan(problem.layout.offsets.tolist()),
        FORMATS[problem.flat.dtype].code,
        False,
        native.isa(),
        torch.get_num_threads(),
    )
    return Candidate(NATIVE, "ours: native entry", "ours", call, lambda _: _packed_report(packed))


def gpu_backends(problem: Problem) -> Candidates:
    """Returns each backend of a GPU apart, without the operator and the checks, on the buffer and on the list."""
    flat, layout, views = problem.flat, problem.layout, problem.views
    made: dict[str, Candidate | str] = {}
    for name in _GPU_BACKENDS:
        backend, key = dispatch.backend(name, flat.device.type), f"ours_{name}"
        reason = backend.unavailable(flat.device.type)
        if reason is not None:
            made[key] = reason
            continue
        scan = partial(backend.tensor_stats, flat, layout, False)
        scan_list = partial(_scan_list, backend, views)
        made[key] = Candidate(key, f"ours: {name} entry", "ours", scan, _packed_report)
        made[f"{key}_list"] = Candidate(f"{key}_list", f"ours: {name} entry, list", "ours", scan_list, _packed_report)
    return made


def _native_module() -> ModuleType:
    module = extension()
    if module is None:
        raise RuntimeError("the native extension is missing")
    return module


def _scan_list(backend: dispatch.Backend, tensors: list[torch.Tensor]) -> torch.Tensor:
    return backend.multi_tensor_stats(tensor_list.read(tensors), False)


def _ours(key: str, label: str, call: Call) -> Candidate:
    return Candidate(key, f"ours: {label}", "ours", call, _table_report)


def _packed_report(packed: torch.Tensor) -> Reported:
    return _table_report(ng.StatsTable(packed, detail=False))


def _table_report(table: ng.StatsTable) -> Reported:
    records = table.to_host()
    return Reported(
        bad=[record.first_nonfinite >= 0 for record in records],
        nonfinite=[record.nonfinite for record in records],
        first=[record.first_nonfinite for record in records] if len(records) > 1 else None,
        absmax=[record.absmax for record in records],
        norm=[record.sumsq**0.5 for record in records],
        finite_only=True,
    )


# Peers


def peers(problem: Problem, with_compile: bool, others: Mapping[str, Maker]) -> Candidates:
    """Returns the peers on all devices and `others`, by key.

    Args:
        problem: What they work on.
        with_compile: Whether to compile, which takes a while.
        others: Makers of the peers of this device alone, by key.
    """
    made: dict[str, Candidate | str] = {peer.key: peer for peer in _eager(problem)}
    made["compile"] = _tried(_compiled, problem) if with_compile else "switched off with --no-compile"
    for key, maker in {"amp_unscale": _amp, "deepspeed": _deepspeed, **others}.items():
        made[key] = _tried(maker, problem)
    return made


def _tried(maker: Maker, problem: Problem) -> Candidate | str:
    try:
        peer = maker(problem)
        peer.call()
    except Exception as error:  # noqa: BLE001  (not installed, or not for this device or dtype: theirs to say)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return peer


def _peer(key: str, label: str, call: Call, report: Callable[[Any], Reported]) -> Candidate:
    return Candidate(key, label, "peer", call, report)


def _flag_report(result: Any) -> Reported:
    return Reported(bad=[bool(result)])


def _all_finite_report(result: Any) -> Reported:
    return Reported(bad=[not bool(result)])


def _eager(problem: Problem) -> list[Candidate]:
    flat, views = problem.flat, problem.views

    def every_idiom() -> list[Any]:
        return [_idiom(view) for view in views]

    def extremes_and_norm() -> tuple[list[Any], list[torch.Tensor]]:
        return [torch.aminmax(flat)], [torch.linalg.vector_norm(flat)]

    def every_extremes_and_norm() -> tuple[list[Any], list[torch.Tensor]]:
        return [torch.aminmax(view) for view in views], list(torch._foreach_norm(views))

    return [
        _peer(ISFINITE, "isfinite.all (flag only)", lambda: torch.isfinite(flat).all(), _all_finite_report),
        _peer("idiom", "isfinite + abs.max + norm", lambda: [_idiom(flat)], _idiom_report),
        _peer("idiom_per_segment", "same, per segment", every_idiom, _idiom_report),
        _peer(AMINMAX, "aminmax + vector_norm", extremes_and_norm, _extremes_report),
        _peer(AMINMAX_PER_SEGMENT, "aminmax + _foreach_norm, per segment", every_extremes_and_norm, _extremes_report),
        _peer("aminmax", "aminmax", lambda: ([torch.aminmax(flat)], []), _extremes_report),
        _peer("vector_norm", "vector_norm", lambda: [torch.linalg.vector_norm(flat)], _norms_report),
        _peer("foreach_norm", "_foreach_norm, per segment", lambda: list(torch._foreach_norm(views)), _norms_report),
    ]


def _idiom(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What people write."""
    nonfinite = (~torch.isfinite(values)).sum()
    return nonfinite, values.abs().max(), torch.linalg.vector_norm(values)


def _idiom_report(results: list[Any]) -> Reported:
    nonfinite, absmax, norm = zip(*results, strict=True)
    return Reported(
        bad=[bool(count) for count in nonfinite],
        nonfinite=[int(count) for count in nonfinite],
        absmax=[float(value) for value in absmax],
        norm=[float(value) for value in norm],
    )


def _norms_report(norms: list[torch.Tensor]) -> Reported:
    """Says nothing of what is not finite: a norm of finite elements may overflow."""
    return Reported(norm=[float(norm) for norm in norms])


def _extremes_report(result: tuple[list[Any], list[torch.Tensor]]) -> Reported:
    """Two numbers tell whether all are finite, for aminmax carries NaN along."""
    extremes, norms = result
    return Reported(
        bad=[not bool(torch.isfinite(low) & torch.isfinite(high)) for low, high in extremes],
        absmax=[max(abs(float(low)), abs(float(high))) for low, high in extremes],
        norm=[float(value) for value in norms] or None,
    )


def _amp(problem: Problem) -> Candidate:
    """Exists for some dtypes on some devices only."""
    return _peer(
        "amp_unscale", "amp check and unscale (flag only)", partial(_amp_unscale, problem.scratch), _flag_report
    )


def _amp_unscale(scratch: list[torch.Tensor]) -> torch.Tensor:
    """What torch.amp.GradScaler does to unscale, with a scale of 1. It also writes all elements."""
    device = scratch[0].device
    found = torch.zeros(1, device=device)
    torch._amp_foreach_non_finite_check_and_unscale_(scratch, found, torch.ones(1, device=device))
    return found


def _fused(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    finite = torch.isfinite(values)
    numbers = torch.where(finite, values, 0).float()
    return (~finite).sum(), numbers.abs().max(), (numbers * numbers).sum()


def _compiled(problem: Problem) -> Candidate:
    """torch.compile of the flat expression, here and now, for this shape and number of threads."""
    torch.compiler.reset()  # else the limit of recompilations is soon met
    fused = torch.compile(_fused, dynamic=False)
    return _peer("compile", "torch.compile, fused", partial(fused, problem.flat), _fused_report)


def _fused_report(result: Any) -> Reported:
    nonfinite, absmax, sumsq = result
    return Reported(
        bad=[bool(nonfinite)],
        nonfinite=[int(nonfinite)],
        absmax=[float(absmax)],
        norm=[float(sumsq) ** 0.5],
        finite_only=True,
    )


def _deepspeed(problem: Problem) -> Candidate:
    """What one rank does at a step of ZeRO stage 1 or 2, without the collectives.

    DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial and get_grad_norm_direct
    (deepspeed/runtime/zero/stage_1_and_2.py) of 0.19.8, on gradients that are the segments. That it
    waits for the flag is part of it.
    """
    views, device = problem.views, problem.flat.device
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.runtime.utils import has_inf_or_nan, mask_nan_or_inf_with_val_inplace
    from deepspeed.runtime.zero.utils import get_norm_dtype

    def overflow_and_norm() -> tuple[bool, torch.Tensor]:
        invalid = torch.zeros([1], dtype=torch.float, device=device)
        for gradient in views:
            invalid += has_inf_or_nan(gradient)
        overflow = bool(invalid.bool().byte()[0].item())
        norms = [torch.linalg.vector_norm(gradient.data.to(get_norm_dtype()).detach(), ord=2.0) for gradient in views]
        total = torch.stack(norms).pow(2.0).sum().float().pow(1.0 / 2.0)
        mask_nan_or_inf_with_val_inplace(total, device=total.device)
        return overflow, total

    def report(result: tuple[bool, torch.Tensor]) -> Reported:
        return Reported(bad=[result[0]], norm=[float(result[1])])

    return _peer("deepspeed", "DeepSpeed ZeRO-1/2, check + norm", overflow_and_norm, report)


def _apex(problem: Problem) -> Candidate:
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_l2norm
    return _multi_tensor_norm("apex", "apex multi_tensor_l2norm (norms only)", applier, kernel, problem)


def _transformer_engine(problem: Problem) -> Candidate:
    module = importlib.import_module("transformer_engine.pytorch.optimizers")
    applier, kernel = module.multi_tensor_applier, module.multi_tensor_l2norm
    return _multi_tensor_norm("transformer_engine", "TransformerEngine, the same", applier, kernel, problem)


def _multi_tensor_norm(key: str, label: str, applier: Any, kernel: Any, problem: Problem) -> Candidate:
    """The norm of every segment and of all. The flag stays up once it is, so only the norms are believed."""
    flag = torch.zeros(1, dtype=torch.int32, device=problem.flat.device)

    def report(result: Any) -> Reported:
        norms = [float(norm) for norm in result[1]]
        return Reported(bad=[not math.isfinite(norm) for norm in norms], norm=norms)

    return _peer(key, label, lambda: applier(kernel, flag, [problem.views], True), report)


GPU_PEERS: dict[str, Maker] = {"apex": _apex, "transformer_engine": _transformer_engine}
