"""What the guards of many ranks send, and that one that is late or dead holds up none for ever."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from hallo_numguard.guard.step import figure_exchange

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import many_ranks
from many_ranks import ELEMENTS, Job, simulate

REDUCTIONS_OF_A_DIAGNOSIS = 40
BYTES_OF_A_DIAGNOSIS = 20_000


@pytest.mark.parametrize("ranks", [3, 64])
def test_what_a_rank_sends_does_not_grow_with_their_number(ranks, monkeypatch):
    monkeypatch.setattr(figure_exchange, "MAX_ROWS", 2)
    result = simulate(ranks)
    assert (result.clean.reductions, result.clean.reduced_bytes) == (2, 48)
    assert result.clean.requests == 0
    assert result.bad.reductions <= REDUCTIONS_OF_A_DIAGNOSIS
    assert result.bad.reduced_bytes <= BYTES_OF_A_DIAGNOSIS
    assert result.verdicts == ["undetermined"] * ranks
    assert result.alone == 0
    assert result.norms == [math.sqrt(ranks * (ELEMENTS + 3))] * ranks


def test_few_ranks_send_their_figures_in_one_sum():
    result = simulate(3)
    assert (result.clean.reductions, result.clean.reduced_bytes) == (1, 3 * 40)
    assert result.norms == [math.sqrt(3 * (ELEMENTS + 3))] * 3


def test_one_that_is_late_is_waited_for():
    assert simulate(8, late=0.2).alone == 0


def test_one_that_never_comes_is_not(monkeypatch):
    monkeypatch.setattr(many_ranks, "WAIT_SECONDS", 0.5)
    result = simulate(8, is_dead=True)
    assert result.verdicts == ["", *["undetermined"] * 7]
    assert result.alone == 7


def test_a_name_of_many_ranks_is_short():
    job = Job(1000)
    job.become(0)
    with job.installed():
        meetings = many_ranks.Ranks()._rendezvous
        meetings.leave()
    assert job.traffic.request_bytes < 100
