"""The flight recorder where rows travel: on a GPU a step's figures arrive when a later one is under way."""

from __future__ import annotations

import torch

from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.step.recorder import ROW_WIDTH, Recorder
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.device import HostRing


class SlowRows(HostRing):
    """Rows that have not arrived, unless the read waits."""

    def __init__(self, length):
        super().__init__(length, ROW_WIDTH, torch.device("cpu"))
        self.under_way = set()

    def read(self, index, wait):
        return None if index in self.under_way and not wait else super().read(index, wait)


def record(recorder, steps):
    for step in steps:
        table = multi_tensor_stats([torch.full((4,), float(step))])
        recorder.begin(step, 1.0, ScannedPieces(table, [Piece(0, 0)]))
        recorder.end(applied=True)


def fresh(recorder, wait=False):
    found = recorder.fresh(wait)
    assert all(row.absmax == row.step for row in found), "each row with its own step"
    return [row.step for row in found]


def make(length):
    recorder = Recorder(length, ["weight"], None)
    recorder._rows = SlowRows(length)
    return recorder, recorder._rows.under_way


def test_every_step_is_fresh_once_and_in_order_whenever_it_arrives():
    recorder, under_way = make(8)
    assert fresh(recorder) == []
    under_way |= {1, 2}
    record(recorder, [1, 2, 3, 4])
    assert fresh(recorder) == [1], "not 4, which would be out of order"
    assert [row.step for row in recorder.read()] == [1, 2, 3, 4]
    under_way -= {1}
    assert fresh(recorder) == [2]
    assert fresh(recorder, wait=True) == [3, 4]
    assert fresh(recorder, wait=True) == []


def test_rows_that_are_not_read_in_time_are_overwritten():
    recorder, _ = make(3)
    record(recorder, range(1, 8))
    assert fresh(recorder) == [5, 6, 7]


def test_repeated_steps_after_a_rollback_are_fresh():
    recorder, _ = make(8)
    record(recorder, [1, 2, 3])
    assert fresh(recorder) == [1, 2, 3]
    record(recorder, [2, 3])
    assert fresh(recorder) == [2, 3]
