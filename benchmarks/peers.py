"""What else does the work, or a part of it. The views of the segments exist before the timing."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from candidates import Candidate, Claims
from problem import Problem
from timing import Call

ISFINITE = "isfinite_all"

Made = Candidate | str  # a peer, or why there is none


def peers(problem: Problem, with_compile: bool) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the peers that run here, and by key why the others do not."""
    made: dict[str, Made] = {peer.key: peer for peer in _eager(problem)}
    made["compile"] = _compiled(problem) if with_compile else "switched off with --no-compile"
    made["deepspeed"] = _deepspeed(problem)
    found = [peer for peer in made.values() if isinstance(peer, Candidate)]
    return found, {key: reason for key, reason in made.items() if isinstance(reason, str)}


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
            "aminmax_norm",
            "aminmax + vector_norm",
            lambda: (torch.aminmax(flat), torch.linalg.vector_norm(flat)),
            lambda result: _extremes_claims([result[0]], [result[1]]),
        ),
        _peer(
            "aminmax_foreach_norm",
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
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(scratch, found, torch.ones(1))
    return found


def _fused(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    finite = torch.isfinite(values)
    numbers = torch.where(finite, values, 0).float()
    return (~finite).sum(), numbers.abs().max(), (numbers * numbers).sum()


def _compiled(problem: Problem) -> Made:
    """torch.compile of the flat expression, here and now, for this shape and number of threads."""
    torch.compiler.reset()  # else the limit of recompilations is soon met
    fused = torch.compile(_fused, dynamic=False)
    try:
        fused(problem.flat)
    except RuntimeError as error:  # the base of what dynamo, inductor and its C++ builder raise
        return f"does not compile: {str(error).strip().splitlines()[0]}"
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


def _deepspeed(problem: Problem) -> Made:
    """What one rank does at a step of ZeRO stage 1 or 2, without the collectives.

    DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial and get_grad_norm_direct
    (deepspeed/runtime/zero/stage_1_and_2.py), on gradients that are the segments.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.runtime.utils import has_inf_or_nan, mask_nan_or_inf_with_val_inplace
        from deepspeed.runtime.zero.utils import get_norm_dtype
    except ImportError as error:
        return f"needs a DeepSpeed that has what 0.19.8 has: {error}"
    views = problem.views

    def overflow_and_norm() -> tuple[bool, torch.Tensor]:
        invalid = torch.zeros([1], dtype=torch.float)
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


def _floats(values: list[torch.Tensor]) -> list[float]:
    return [float(value) for value in values]


def _integers(values: list[torch.Tensor]) -> list[int]:
    return [int(value) for value in values]
