"""Chaos, a few tries of it: `make chaos` makes 200."""

from __future__ import annotations

import pytest
from chaos.ranks import run


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2])
def test_no_run_notices_what_goes_wrong_in_the_guard(world):
    outcome = run(world, seed=1, count=12)
    assert outcome.wrong == []
    assert outcome.hit >= 3
