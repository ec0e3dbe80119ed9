"""Causes of what is not finite, each once: `make campaign` plants each in every way of training (docs/causes.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from causes import ranks as rank_processes
from causes.cases import DTYPES, EXECUTIONS, PLACES, WORLDS, Case, Seen, all_cases, covering, each_once, problems
from causes.table import CAUSES, EXPECTED
from causes.ways import WAYS

CASES = each_once(all_cases(EXPECTED))


@pytest.fixture(scope="module")
def ranks():
    groups = {world: rank_processes.start(world) for world in (1, 2)}
    yield groups
    for group in groups.values():
        group.stop()


def test_the_lists_agree():
    assert list(WAYS) == list(WORLDS)
    assert len(CAUSES) >= 40
    assert len(EXPECTED) == len({*EXPECTED}) >= 55


def test_every_cause_is_planted_in_every_way_and_precision_that_fits():
    cases = all_cases(EXPECTED)
    chosen = covering(cases)
    for axis in ("way", "dtype", "place", "execution"):
        assert {(case.cause, getattr(case, axis)) for case in chosen} == {
            (case.cause, getattr(case, axis)) for case in cases
        }
    assert {(case.way, case.execution) for case in chosen} == {(case.way, case.execution) for case in cases}


def test_the_part_has_every_cause_and_every_way():
    assert [case.cause for case in CASES] == list(EXPECTED)
    assert {case.way for case in CASES} == set(WORLDS)
    assert {case.dtype for case in CASES} == set(DTYPES)
    assert {case.execution for case in CASES} == set(EXECUTIONS)
    assert {case.place for case in CASES} == set(PLACES)


CASE = Case("x / 0", "plain", "fp32", "model", "eager")
REPORT = {
    "verdict": "forward_nonfinite",
    "provisional": False,
    "kind": "activation",
    "name": "place",
    "module": "place",
    "operation": "aten.div.Tensor",
    "line": "table.py:1",
    "sample": 2,
    "rank": 0,
    "text": "",
}
SILENT = {**REPORT, "verdict": "undetermined", "operation": None, "line": None, "module": "", "name": "loss"}


FALSE = "step 3: verdict input_nonfinite"


def seen_of(first, second):
    return Seen("", {"3": first, "5": second})


@pytest.mark.parametrize(
    ("case", "seen", "problem"),
    [
        (CASE, seen_of(REPORT, REPORT), None),
        (CASE, seen_of({**REPORT, "verdict": "input_nonfinite"}, REPORT), "step 3: verdict input_nonfinite"),
        (CASE, seen_of({**REPORT, "operation": "aten.log.default"}, REPORT), "step 3: operation aten.log.default"),
        (CASE, seen_of({**REPORT, "line": "ways.py:1"}, REPORT), "step 3: line ways.py:1"),
        (CASE, seen_of({**REPORT, "module": "first"}, {**REPORT, "sample": 1}), "step 5: sample 1"),
        (CASE, Seen("", {"3": REPORT}), "reports of steps (3,)"),
        (CASE, Seen("ValueError", {}), "ended early: ValueError"),
        (replace(CASE, place="loss"), seen_of(SILENT, {**REPORT, "verdict": "loss_nonfinite"}), None),
        (replace(CASE, place="loss", way="wrap_step"), seen_of(SILENT, REPORT), "step 3: verdict undetermined"),
        (
            replace(CASE, place="loss"),
            seen_of({**SILENT, "verdict": "rank_fault"}, REPORT),
            "step 3: verdict rank_fault",
        ),
    ],
)
def test_what_is_not_as_it_must_be_is_told(case, seen, problem):
    found = problems(case, EXPECTED[case.cause], [seen])
    assert found == [] if problem is None else found[0] == f"rank 0: {problem}"


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cause_is_named(ranks, case):
    assert problems(case, EXPECTED[case.cause], ranks[case.world].run(case)) == []
