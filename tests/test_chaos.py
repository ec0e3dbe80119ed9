"""Chaos, for less than a minute: `make chaos` makes 200 tries."""

from __future__ import annotations

import pytest
from chaos.ranks import run


@pytest.mark.multiprocess
@pytest.mark.parametrize(("world", "seconds"), [(1, 15), (2, 25)])
def test_no_run_notices_what_goes_wrong_in_the_guard(world, seconds):
    outcome = run(world, seed=1, count=1000, seconds=seconds)
    assert outcome.wrong == []
    assert outcome.hit >= 3
