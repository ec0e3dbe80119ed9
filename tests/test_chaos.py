"""Chaos, a few tries of it: `make chaos` makes 200."""

from __future__ import annotations

import pytest
from chaos.ranks import run


@pytest.mark.multiprocess
@pytest.mark.parametrize(("model", "world", "tries"), [("whole", 1, 12), ("whole", 2, 12), ("staged", 2, 6)])
def test_no_run_notices_what_goes_wrong_in_the_guard(model, world, tries):
    outcome = run(world, seed=1, count=tries, model=model)
    assert outcome.wrong == []
    assert outcome.hit >= tries // 4
