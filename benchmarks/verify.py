"""A benchmark of wrong code is worthless: all results are compared before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from candidates import Candidate, Claims
from problem import Problem, Truth, planted, together, truths

# Relative. torch adds up in float at best: a fifth of the norm of 128 Mi float16 elements is lost.
_NORM_TOLERANCE = {"fp64": 1e-6, "fp32": 2e-2, "bf16": 2e-2, "fp16": 0.3}
_OUR_NORM_TOLERANCE = {"cpu": 1e-6, "cuda": 5e-6}


class WrongResult(Exception):
    """A candidate says something that is not true."""


def check(problem: Problem, candidates: Sequence[Candidate]) -> dict[str, float]:
    """Calls every candidate with values planted and without.

    Returns:
        The largest relative error of a norm without, by key; for those that give one.

    Raises:
        WrongResult: If one says something that is not true.
    """
    known = truths(problem)
    with planted(problem, known) as changed:
        for candidate in candidates:
            _check_claims(candidate, candidate.claims(candidate.call()), changed, problem)
    norm_errors = {}
    for candidate in candidates:
        claims = candidate.claims(candidate.call())
        error = _check_claims(candidate, claims, known, problem)
        if claims.norm is not None:
            norm_errors[candidate.key] = error
    return norm_errors


def _check_claims(candidate: Candidate, claims: Claims, parts: Sequence[Truth], problem: Problem) -> float:
    """Returns the largest relative error of a norm, 0 if it claims none."""
    ours = candidate.kind == "ours"
    tolerance = _OUR_NORM_TOLERANCE[problem.flat.device.type] if ours else _NORM_TOLERANCE[problem.dtype]
    worst = 0.0
    for name in ("bad", "nonfinite", "first", "absmax", "norm"):
        said = getattr(claims, name)
        if said is None:
            continue
        units = parts if len(said) == len(parts) else [together(parts)]
        for index, (value, unit) in enumerate(zip(said, units, strict=True)):
            if name in ("absmax", "norm") and unit.nonfinite and not claims.of_finite:
                continue
            true = unit.nonfinite > 0 if name == "bad" else getattr(unit, name)
            error = _relative_error(value, true) if name == "norm" else 0.0
            if error > tolerance or (name != "norm" and value != true):
                raise WrongResult(
                    f"{candidate.label}: {name} of {problem.dtype} unit {index} of {len(units)} "
                    f"should be {true}, but it says {value}"
                )
            worst = max(worst, error)
    return worst


def _relative_error(value: float, true: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return abs(value - true) / true if true else abs(value)
