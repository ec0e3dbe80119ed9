"""The fault campaign, a representative part of it: `make campaign` runs all (docs/campaign.md)."""

from __future__ import annotations

import pytest

from campaign import ranks as rank_processes
from campaign.cases import FAULTS, KINDS, all_cases, problems, representative

CASES = representative(all_cases())


@pytest.fixture(scope="module")
def ranks():
    groups = {world: rank_processes.start(world) for world in (1, 2)}
    yield groups
    for group in groups.values():
        group.stop()


def test_the_part_represents_the_whole():
    assert len(CASES) >= 60
    assert {case.fault for case in CASES} == set(FAULTS)
    assert {(case.setup, case.stage, case.offload) for case in CASES} == set(KINDS)
    pairs = {(case.fault, case.kind) for case in CASES}
    assert len(pairs) * 2 >= len({(case.fault, case.kind) for case in all_cases()}) - len(KINDS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_named(ranks, case):
    assert problems(case, ranks[case.world].run(case)) == []
