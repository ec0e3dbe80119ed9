"""The gate before the timing: all results are compared with the expected ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from candidates import Candidate, Reported
from problems import Expected, Problem, expected_of, planted, together

# Relative. torch adds up in float at best: a fifth of the norm of 128 Mi float16 elements is lost.
_NORM_TOLERANCE = {"fp64": 1e-6, "fp32": 2e-2, "bf16": 2e-2, "fp16": 0.3}
_OUR_NORM_TOLERANCE = {"cpu": 1e-6, "cuda": 5e-6}


class WrongResult(Exception):
    """A candidate reports something that is not true."""


def check(problem: Problem, candidates: Sequence[Candidate]) -> dict[str, float]:
    """Calls every candidate with values planted and without.

    Returns:
        Largest relative error of a norm without them, by key; for candidates that report one.

    Raises:
        WrongResult: If a candidate reports something that is not true.
    """
    known = expected_of(problem)
    with planted(problem, known) as changed:
        for candidate in candidates:
            _compare(candidate, candidate.report(candidate.call()), changed, problem)
    norm_errors = {}
    for candidate in candidates:
        reported = candidate.report(candidate.call())
        error = _compare(candidate, reported, known, problem)
        if reported.norm is not None:
            norm_errors[candidate.key] = error
    return norm_errors


def _compare(candidate: Candidate, reported: Reported, expected: Sequence[Expected], problem: Problem) -> float:
    """Returns the largest relative error of a norm, 0 if there is none."""
    ours = candidate.kind == "ours"
    tolerance = _OUR_NORM_TOLERANCE[problem.flat.device.type] if ours else _NORM_TOLERANCE[problem.dtype]
    worst = 0.0
    for name in ("bad", "nonfinite", "first", "absmax", "norm"):
        values = getattr(reported, name)
        if values is None:
            continue
        units = expected if len(values) == len(expected) else [together(expected)]
        for index, (value, unit) in enumerate(zip(values, units, strict=True)):
            if name in ("absmax", "norm") and unit.nonfinite and not reported.finite_only:
                continue
            true = unit.nonfinite > 0 if name == "bad" else getattr(unit, name)
            error = _relative_error(value, true) if name == "norm" else 0.0
            if error > tolerance or (name != "norm" and value != true):
                raise WrongResult(
                    f"{candidate.label}: {name} of {problem.dtype} unit {index} of {len(units)} "
                    f"should be {true}, but it is {value}"
                )
            worst = max(worst, error)
    return worst


def _relative_error(value: float, true: float) -> float:
    if not math.isfinite(value):
        return math.inf
    return abs(value - true) / true if true else abs(value)
