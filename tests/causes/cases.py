"""The cases: a cause in a way of training, and what must be said of it. Knows no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BAD_STEPS = (3, 5)
STEPS = 6
SAMPLE = 2  # the special one
EAGER, COMPILED, INDUCTOR = "eager", "compiled", "inductor"
REENTRANT, CHECKPOINTED = "checkpointed (reentrant)", "checkpointed"
EXECUTIONS = (EAGER, COMPILED, REENTRANT, CHECKPOINTED)
DTYPES = ("fp32", "bf16", "fp16")
PLACES = ("model", "loss")

WORLDS = {
    "plain": 1,
    "wrap_step": 1,
    "Accelerate": 1,
    "Trainer": 1,
    "Lightning": 1,
    "DDP": 2,
    "FSDP2": 2,
    "DeepSpeed 0": 2,
    "DeepSpeed 1": 2,
    "DeepSpeed 2": 2,
    "DeepSpeed 3": 2,
}
"""Number of processes of each way to train."""

WITH_STEP = ("wrap_step", "Trainer", "Lightning")
"""Ways in which the guard knows the function that makes the loss."""

OPEN = ("undetermined", "loss_nonfinite", "backward_nonfinite")
"""What may be said of the first bad step without such a function, if no operation is named."""


@dataclass(frozen=True)
class Expected:
    """What must be said of a cause.

    Attributes:
        dtypes, places, ways, executions: Where it can be.
        verdicts: Verdict by place.
        operations: Names of the operation, without namespace; none if there is none.
        name: Name that the report must hold; "" if any will do.
        file: File of the line that must be named; "" without one.
        stays: Whether it is there in every step from the first bad one on, and in every sample.
        is_loss_finite: Whether the loss does not see it.
    """

    dtypes: Sequence[str]
    places: Sequence[str]
    ways: Sequence[str]
    executions: Sequence[str]
    verdicts: Mapping[str, str]
    operations: Sequence[str] = ()
    name: str = ""
    file: str = ""
    stays: bool = False
    is_loss_finite: bool = False


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        cause: Name in the table.
        way: A key of `WORLDS`.
        dtype: One of `DTYPES`.
        place: "model" or "loss".
        execution: One of `EXECUTIONS`, or `INDUCTOR`.
    """

    cause: str
    way: str
    dtype: str
    place: str
    execution: str

    def __str__(self) -> str:
        return f"{self.cause}-{self.way}-{self.dtype}-{self.place}-{self.execution}"

    @property
    def world(self) -> int:
        """Number of processes."""
        return WORLDS[self.way]

    @property
    def culprit(self) -> int:
        """The rank with the special sample."""
        return self.world - 1

    def to_dict(self) -> dict[str, Any]:
        """For the worker."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a rank has seen.

    Attributes:
        error: What ended the run before its end; "" if nothing did.
        reports: What each report says, by step: verdict, provisional, kind, name, module, operation, line,
            sample, rank, text.
        contained: Failures of the guard itself.
        is_finite: Whether the weights are finite in the end.
    """

    error: str
    reports: Mapping[str, Mapping[str, Any]]
    contained: Sequence[str] = field(default=())
    is_finite: bool = True


def all_cases(table: Mapping[str, Expected]) -> list[Case]:
    """Every case that can be, but for inductor."""
    return [
        Case(cause, way, dtype, place, execution)
        for cause, expected in table.items()
        for way, dtype, place, execution in itertools.product(WORLDS, DTYPES, PLACES, EXECUTIONS)
        if _exists(expected, way, dtype, place, execution)
    ]


def once_each_under_inductor(table: Mapping[str, Expected]) -> list[Case]:
    """A case of each cause that compiles, compiled by inductor."""
    return [
        Case(cause, "plain", expected.dtypes[0], expected.places[0], INDUCTOR)
        for cause, expected in table.items()
        if COMPILED in expected.executions and "plain" in expected.ways
    ]


def _exists(expected: Expected, way: str, dtype: str, place: str, execution: str) -> bool:
    if place == "loss" and execution in (REENTRANT, CHECKPOINTED):  # there is nothing in the model to be recomputed
        return False
    if execution == COMPILED and way in ("FSDP2", "DeepSpeed 3"):  # gathering of weights is not compiled
        return False
    here = ((way, expected.ways), (dtype, expected.dtypes), (place, expected.places), (execution, expected.executions))
    return all(value in values for value, values in here)


def covering(cases: Sequence[Case]) -> list[Case]:
    """Returns cases with every pair of values of any two axes that occurs, chosen greedily."""
    pairs = {case: _pairs(case) for case in cases}
    missing = set().union(*pairs.values())
    chosen: list[Case] = []
    for cause in dict.fromkeys(case.cause for case in cases):  # pairs with the cause first: the others are in them
        own = [case for case in cases if case.cause == cause]
        while True:
            best = max(own, key=lambda case: len(missing & pairs[case]))
            if not missing & pairs[best]:
                break
            chosen.append(best)
            missing -= pairs[best]
    return chosen


def each_once(cases: Sequence[Case]) -> list[Case]:
    """Returns a case of each cause, with ways, precisions, places and executions in turn."""
    chosen: list[Case] = []
    for cause in dict.fromkeys(case.cause for case in cases):
        used = [value for case in chosen for value in _values(case)]
        own = [case for case in cases if case.cause == cause]
        chosen.append(min(own, key=lambda case: [used.count(value) for value in _values(case)]))
    return chosen


def _values(case: Case) -> tuple[str, ...]:
    return case.way, case.execution, case.dtype, case.place


def _pairs(case: Case) -> frozenset[tuple[tuple[str, str], ...]]:
    return frozenset(itertools.combinations(sorted(asdict(case).items()), 2))


def problems(case: Case, expected: Expected, seen: Sequence[Seen]) -> list[str]:
    """Returns what is wrong with what the ranks have seen, in words; nothing if all is as it must be."""
    found = [f"rank {rank}: {problem}" for rank, one in enumerate(seen) for problem in _problems(case, expected, one)]
    verdicts = [[report["verdict"] for report in one.reports.values()] for one in seen]
    return found + ["ranks disagree"] * any(other != verdicts[0] for other in verdicts)


def _problems(case: Case, expected: Expected, seen: Seen) -> Iterator[str]:
    if seen.error:
        yield f"ended early: {seen.error}"
        return
    yield from (f"contained: {failure}" for failure in seen.contained)
    if case.execution == INDUCTOR and not seen.reports and seen.is_finite:
        return  # it computes 0 times y as 0, so that not every cause happens
    steps = tuple(int(step) for step in seen.reports)
    right = [BAD_STEPS]
    if expected.stays:  # an update is looked at one step later where that saves a wait
        right = [tuple(range(first, STEPS + 1)) for first in (BAD_STEPS[0], BAD_STEPS[0] + 1)]
        right = right[: 1 + (expected.verdicts[case.place] == "update_nonfinite")]
    if steps not in right:
        yield f"reports of steps {steps}"
    for step in BAD_STEPS:
        report = seen.reports.get(str(step))
        if report is not None:
            must = step >= _named_from(case, expected)
            yield from (f"step {step}: {wrong}" for wrong in _differences(case, expected, report, must))


def _named_from(case: Case, expected: Expected) -> int:
    """The first step whose report must name all."""
    knows = case.way in WITH_STEP or case.place == "model"
    return BAD_STEPS[0] if knows else BAD_STEPS[1]


def _differences(case: Case, expected: Expected, report: Mapping[str, Any], must: bool) -> Iterable[str]:
    """What a report says that is not right; what it must say and does not, if it `must`."""
    # For all that is seen, the gradients of code after the model may be too large for the loss scale.
    is_open = report["verdict"] in OPEN or (report["verdict"] == "scale_too_high" and report["provisional"])
    if report["verdict"] != expected.verdicts[case.place] and (must or not is_open):
        yield f"verdict {report['verdict']}"
    named = (report["operation"] or "").split(".")
    if (
        expected.operations
        and (must or report["operation"])
        and (len(named) < 2 or named[1] not in expected.operations)
    ):
        yield f"operation {report['operation']}"
    if expected.file and (must or report["line"]) and expected.file not in (report["line"] or ""):
        yield f"line {report['line']}"
    if must and case.place == "model" and expected.operations and "place" not in report["module"] + report["name"]:
        yield f"module {report['module']!r}, name {report['name']!r}"
    if must and expected.name not in report["text"]:
        yield f"{expected.name} is not named"
    if report["sample"] not in (None, SAMPLE) and not expected.stays:
        yield f"sample {report['sample']}"
    if must and report["rank"] not in (None, case.culprit) and not expected.stays:
        yield f"rank {report['rank']}"
