"""What else does the work, or a part of it. The views of the segments exist before the timing."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from candidates import Candidate, Claims, Made
from problem import Problem
from timing import Call

ISFINITE = "isfinite_all"

AMINMAX = "aminmax_norm"
AMINMAX_PER_SEGMENT = "aminmax_foreach_norm"

Maker = Callable[[Problem], Candidate]


def peers(problem: Problem, with_compile: bool, others: Mapping[str, Maker]) -> dict[str, Made]:
    """Returns the peers on all devices and `others`, or by key why there is none.

    Args:
        problem: What they work on.
        with_compile: Whether to compile, which takes a while.
        others: What makes those of this device alone, by key.
    """
    made: dict[str, Made] = {peer.key: peer for peer in _eager(problem)}
    made["compile"] = _tried(_compiled, problem) if with_compile else "switched off with --no-compile"
    for key, maker in {"deepspeed": _deepspeed, **others}.items():
        made[key] = _tried(maker, problem)
    return made


def _tried(maker: Maker, problem: Problem) -> Made:
    try:
        peer = maker(problem)
        peer.call()
    except Exception as error:  # noqa: BLE001  (not installed, or not for this device or dtype: theirs to say)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return peer


def _peer(key: str, label: str, call: Call, claims: Callable[[Any], Claims]) -> Candidate:
    return Candidate(key, label, "peer", call, claims)


def _eager(problem: Problem) -> list[Candidate]:
    flat, views = problem.flat, problem.views
    return [
        _peer(
            ISFINITE,
            "isfinite.all (flag only)",
            lambda: torch.isfinite(flat).all(),
            lambda result: Claims(bad=[not result]),
        ),
        _peer("idiom", "isfinite + abs.max + norm", partial(_idiom, flat), _idiom_claims),
        _peer(
            "idiom_per_segment",
            "same, per segment",
            lambda: [_idiom(view) for view in views],
            lambda result: _idiom_claims([list(column) for column in zip(*result, strict=True)]),
        ),
        _peer(
            AMINMAX,
            "aminmax + vector_norm",
            lambda: (torch.aminmax(flat), torch.linalg.vector_norm(flat)),
            lambda result: _extremes_claims([result[0]], [result[1]]),
        ),
        _peer(
            AMINMAX_PER_SEGMENT,
            "aminmax + _foreach_norm, per segment",
            lambda: ([torch.aminmax(view) for view in views], torch._foreach_norm(views)),
            lambda result: _extremes_claims(*result),
        ),
        _peer(
            "amp_unscale",
            "amp check and unscale (flag only)",
            partial(_amp, problem.scratch),
            lambda result: Claims(bad=[bool(result)]),
        ),
    ]


def _idiom(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What people write."""
    nonfinite = (~torch.isfinite(values)).sum()
    return nonfinite, values.abs().max(), torch.linalg.vector_norm(values)


def _idiom_claims(result: Any) -> Claims:
    columns = [column if isinstance(column, list) else [column] for column in result]
    nonfinite, absmax, norm = columns
    return Claims(
        bad=[bool(count) for count in nonfinite],
        nonfinite=_integers(nonfinite),
        absmax=_floats(absmax),
        norm=_floats(norm),
    )


def _extremes_claims(extremes: list[Any], norms: list[torch.Tensor]) -> Claims:
    """Two numbers tell whether all are finite, for aminmax carries NaN along."""
    absmax = [max(abs(float(low)), abs(float(high))) for low, high in extremes]
    finite = [bool(torch.isfinite(low) & torch.isfinite(high)) for low, high in extremes]
    return Claims(bad=[not good for good in finite], absmax=absmax, norm=_floats(norms))


def _amp(scratch: list[torch.Tensor]) -> torch.Tensor:
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
    return _peer("compile", "torch.compile, fused", partial(fused, problem.flat), _compiled_claims)


def _compiled_claims(result: Any) -> Claims:
    nonfinite, absmax, sumsq = result
    return Claims(
        bad=[bool(nonfinite)],
        nonfinite=[int(nonfinite)],
        absmax=[float(absmax)],
        norm=[float(sumsq) ** 0.5],
        of_finite=True,
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

    return _peer(
        "deepspeed",
        "DeepSpeed ZeRO-1/2, check + norm",
        overflow_and_norm,
        lambda result: Claims(bad=[result[0]], norm=[float(result[1])]),
    )


def _apex(problem: Problem) -> Candidate:
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_l2norm
    return _multi_tensor_norm("apex", "apex multi_tensor_l2norm (norms only)", applier, kernel, problem)


def _transformer_engine(problem: Problem) -> Candidate:
    module = importlib.import_module("transformer_engine.pytorch.optimizers")
    applier, kernel = module.multi_tensor_applier, module.multi_tensor_l2norm
    label = "TransformerEngine, the same"
    return _multi_tensor_norm("transformer_engine", label, applier, kernel, problem)


def _multi_tensor_norm(key: str, label: str, applier: Any, kernel: Any, problem: Problem) -> Candidate:
    """The norm of every segment and of all. The flag stays up once it is, so only the norms are believed."""
    flag = torch.zeros(1, dtype=torch.int32, device=problem.flat.device)
    return _peer(
        key,
        label,
        lambda: applier(kernel, flag, [problem.views], True),
        lambda result: _norm_claims(_floats(result[1])),
    )


def _norm_claims(norms: list[float]) -> Claims:
    return Claims(bad=[not math.isfinite(norm) for norm in norms], norm=norms)


def _floats(values: list[torch.Tensor]) -> list[float]:
    return [float(value) for value in values]


def _integers(values: list[torch.Tensor]) -> list[int]:
    return [int(value) for value in values]


ON_GPU: dict[str, Maker] = {"apex": _apex, "transformer_engine": _transformer_engine}
