"""What `on_overflow` may do to the run and to the guard."""

from __future__ import annotations

import pytest
import torch

import hallo_numguard as ng

import deepspeed_support as support

pytestmark = pytest.mark.deepspeed

WARN = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
KINDS = [("fp32", 0), ("bf16_fp32", 1), ("fp16", 2), ("bf16", 3)]


def trained(engine):
    """The weights that are trained; stage 3 gives others as they come."""
    return {name: weight for name, weight in support.weights(engine).items() if not name.startswith("frozen")}


@pytest.mark.parametrize(("setup", "stage"), KINDS)
def test_a_checkpoint_that_is_loaded_there_stays_as_it_was_loaded(make, tmp_path, setup, stage):
    loaded = []

    def load(_):
        engine.load_checkpoint(tmp_path)
        loaded.append(trained(engine))

    engine, guard = make(setup, WARN, load, stage=stage)
    support.train_step(engine, 0)
    engine.save_checkpoint(tmp_path)
    scale = guard._adapter.loss_scaling().scale
    for step in range(1, 4):
        support.train_step(engine, step, poison=float("nan") if step == 2 else 1.0)
        if step == 2:
            assert all(weight.equal(loaded[0][name]) for name, weight in trained(engine).items())
    assert guard._adapter.loss_scaling().scale == scale
    assert len(loaded) == 1
    assert [row.applied for row in guard.history] == [True, True, False, True]
    assert all(torch.isfinite(weight).all() for weight in trained(engine).values())


@pytest.mark.parametrize(("setup", "stage"), KINDS)
def test_a_guard_that_is_taken_off_there_leaves_the_step_skipped(make, setup, stage):
    engine, guard = make(setup, WARN, lambda _: guard.detach(), stage=stage)
    support.train_step(engine, 0)
    before = trained(engine)
    support.train_step(engine, 1, poison=float("nan"))
    assert all(weight.equal(before[name]) for name, weight in trained(engine).items())
    assert guard.last_report.step == 2
    support.train_step(engine, 2)
    assert not all(weight.equal(before[name]) for name, weight in trained(engine).items())
    assert "step" not in vars(engine.optimizer)
