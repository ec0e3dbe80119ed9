"""The fault campaign, a representative part of it: `make campaign` runs all (docs/campaign.md)."""

from __future__ import annotations

import pytest

from campaign.cases import DENSE, FAULTS, WAYS, all_cases, problems, representative
from campaign.options import OPTIONS
from campaign.ranks import Ranks

CASES = sorted(representative(all_cases()), key=Ranks.of)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.stop()


def test_the_part_represents_the_whole():
    assert len(CASES) >= 60
    assert {case.fault for case in CASES} == set(FAULTS) - {"refused"}
    assert {case.kind for case in CASES} >= set(DENSE)
    assert {case.way for case in CASES} == set(WAYS) - set(OPTIONS)
    pairs = {(case.fault, case.kind) for case in CASES}
    dense = {(case.fault, case.kind) for case in all_cases() if case.kind in DENSE}
    assert len(pairs) * 2 >= len(dense) - len(DENSE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_named(ranks, case):
    assert problems(case, ranks.run(case)) == []
