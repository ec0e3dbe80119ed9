"""`torch_autocast` in float16: the GradScaler that scales, and who skips."""

from __future__ import annotations

import logging

import pytest

import hallo_numguard as ng

import deepspeed_support as support

pytestmark = pytest.mark.deepspeed

FIRST_SCALE = 256.0
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


@pytest.fixture(autouse=True)
def no_autocast_in_other_tests(monkeypatch):
    from deepspeed.runtime import torch_autocast

    monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False)
    monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_DTYPE", None)


def scaler_of(engine):
    return engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler


@pytest.mark.parametrize(("stage", "clipping"), [(0, 0.0), (0, 0.3), (2, 0.0), (3, 0.0)])
def test_an_overflow_is_seen_with_the_scale_in_force(make, stage, clipping):
    config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
    engine, guard = make("fp32", config, stage=stage, gradient_clipping=clipping, **AUTOCAST)
    plain = support.make_engine("fp32", stage=stage, gradient_clipping=clipping, **AUTOCAST)
    for run in (engine, plain):
        scaler_of(run).load_state_dict({**scaler_of(run).state_dict(), "scale": FIRST_SCALE})
    for step in range(4):
        for run in (engine, plain):
            planted = support.plant_in_gradient((2, 3)) if step == 2 else lambda gradient: gradient
            handle = run.module.hidden.weight.register_hook(planted)
            support.train_step(run, step)
            handle.remove()
    assert guard.last_report.step == 3
    assert guard.last_report.loss_scale == FIRST_SCALE
    assert (guard.last_report.first.name, guard.last_report.first.index) == ("hidden.weight", (2, 3))
    assert [row.applied for row in guard.history] == [True, True, False, True]
    # Before the scaler divides them, with clipping as well; the last one is of half the scale at stage 0.
    assert all(row.norm > FIRST_SCALE for row in guard.history if row.applied)
    lowered = FIRST_SCALE / 2 if stage == 0 else FIRST_SCALE
    assert [scaler_of(run).get_scale() for run in (engine, plain)] == [lowered, lowered]
    weights = support.weights(plain)
    assert all(weight.equal(weights[name]) for name, weight in support.weights(engine).items())


def test_a_scale_that_never_falls_is_told_when_attached(make, caplog):
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        make("fp32", stage=0, **AUTOCAST)
        assert "never lowers the loss scale" not in caplog.text
        make("fp32", stage=1, **AUTOCAST)
    assert "never lowers the loss scale" in caplog.text
