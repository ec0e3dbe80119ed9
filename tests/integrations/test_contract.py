"""What every adapter promises: faults are named, clean runs keep their bits, scalers work, damage is undone."""

from __future__ import annotations

import importlib

import pytest

import hallo_numguard as ng
from hallo_numguard.guard import containment
from hallo_numguard.guard.step.recorder import Recorder

import adapter_support as support
import deepspeed_support
from frameworks import FRAMEWORKS, each_framework, scaling_framework

pytestmark = [
    pytest.mark.usefixtures("cpu_alone"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
]
CASES = [
    pytest.param(framework, name, fault, id=f"{used}-{name}-{fault}")
    for used, framework in FRAMEWORKS.items()
    for name in framework.models
    for fault in support.FAULTS
]


@pytest.mark.parametrize("module", [*FRAMEWORKS, "deepspeed"])
def test_the_function_has_one_name_in_every_file(module):
    adapter = importlib.import_module(f"hallo_numguard.integrations.{module}")
    assert list(adapter.attach.__annotations__)[1:] == ["config", "on_overflow", "also", "return"]


@pytest.mark.parametrize(("framework", "name", "fault"), CASES)
def test_the_campaign(framework, name, fault, tmp_path):
    faulty = framework.faulty(fault, name)
    run = framework.train(faulty, tmp_path)
    assert faulty.problems(run.guard, run.raised) == []


@each_framework
@pytest.mark.parametrize("bf16", [False, True])
def test_a_clean_run_has_the_same_bits(framework, bf16, tmp_path):
    for name in framework.models:
        weights = []
        for guarded in (True, False):
            faulty = framework.faulty("none", name)
            run = framework.train(faulty, tmp_path, guarded, bf16=bf16, accumulate=2)
            weights.append(support.weights(faulty.model))
            if guarded:  # accumulated micro-batches are one step
                assert [record.applied for record in run.guard.history] == [True] * faulty.steps
        support.assert_same_bits(*weights)


@each_framework
def test_the_statistics_are_those_before_clipping(framework, tmp_path):
    norms = [
        framework.train(framework.faulty("none"), tmp_path, clip=clip).guard.history[0].norm for clip in (1e-3, None)
    ]
    assert norms[0] == norms[1] > 1e-2


@scaling_framework
@pytest.mark.parametrize("keep", [True, False])
def test_a_scaler_skips_and_the_guard_says_why(framework, keep, tmp_path):
    faulty = framework.faulty("forward")
    config = ng.GuardConfig(policy=ng.Policy(keep_scale=keep))
    run = framework.train(faulty, tmp_path, scale=2.0**8, config=config)
    assert not run.raised
    assert [record.applied for record in run.guard.history] == [True, True, False, True, True, True]
    report = faulty.reports[0]
    assert (report.verdict, report.loss_scale) == (ng.Verdict.FORWARD_NONFINITE, 2.0**8)
    assert report.first.name == framework.prefix + faulty.model.module
    assert run.scale == (2.0**8 if keep else 2.0**7)


@scaling_framework
@pytest.mark.parametrize(("clip", "fused"), [(1.0, False), (None, False), (None, True)])
def test_a_scaled_clean_run_has_the_same_bits(framework, clip, fused, tmp_path):
    weights = []
    for guarded in (True, False):
        faulty = framework.faulty("none", fused=fused)
        run = framework.train(faulty, tmp_path, guarded, scale=2.0**8, clip=clip)
        weights.append(support.weights(faulty.model))
        if guarded:
            assert {record.loss_scale for record in run.guard.history} == {2.0**8}
    support.assert_same_bits(*weights)


@pytest.mark.contains_failures
@each_framework
def test_a_part_that_fails_costs_that_part(framework, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(Recorder, "begin", fail)
    faulty = framework.faulty("weight")
    run = framework.train(faulty, tmp_path)
    assert {probe for probe, _ in containment.contained} == {"flight recorder"}
    assert run.raised
    assert run.guard.last_report.verdict is ng.Verdict.WEIGHTS_NONFINITE
    assert run.guard.last_report.first.name == framework.prefix + faulty.planted[0]


@pytest.mark.parametrize("framework", [FRAMEWORKS["accelerate"], FRAMEWORKS["transformers"]])
def test_the_learning_rate_waits_for_a_skipped_step(framework, tmp_path):
    faulty = framework.faulty("forward")
    run = framework.train(faulty, tmp_path)
    assert run.scheduled == [record.applied for record in run.guard.history].count(True) == faulty.steps - 1


@scaling_framework
@pytest.mark.parametrize("scale", [None, 2.0**8])
def test_a_run_goes_back_to_its_last_healthy_checkpoint(framework, scale, tmp_path):
    faulty, kept = framework.faulty("weight"), {}
    keeper = ng.CheckpointKeeper(tmp_path / "kept", healthy_after=1)

    def after_step(step, saved):
        if step == 1:
            kept.update(support.weights(faulty.model))
            keeper.save(saved)
        if step == 3:
            support.assert_same_bits(support.weights(faulty.model), kept)

    config = ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback"))
    run = framework.train(faulty, tmp_path, scale=scale, config=config, after_step=after_step)
    assert not run.raised
    assert [record.applied for record in run.guard.history] == [True, True, False, True, True, True]
    assert faulty.reports[0].verdict is ng.Verdict.WEIGHTS_NONFINITE
    assert all(tensor.isfinite().all() for tensor in faulty.model.parameters())
    assert {record.loss_scale for record in run.guard.history} == {scale or 1.0}


RANKS = """
from pathlib import Path
import torch
import adapter_support as support
import hallo_numguard as ng
from frameworks import FRAMEWORKS

framework, folder, parallel = FRAMEWORKS[{name!r}], Path({folder!r}), {parallel!r}
torch.set_num_threads(1)

def train(fault, guarded=True):
    faulty = framework.faulty(fault, kind=support.Untied, ranks=2)
    config = ng.GuardConfig(local_gradients="always")
    run = framework.train(faulty, folder, guarded, parallel=parallel, config=config)
    if guarded:
        problems = faulty.problems(run.guard, run.raised)
        assert problems == [], problems
    return support.weights(faulty.model)

support.assert_same_bits(train("none"), train("none", guarded=False))
train("input")  # bad on the second rank only
print("done")
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_two_ranks(name, parallel, tmp_path):
    script = RANKS.format(name=name, parallel=parallel, folder=str(tmp_path))
    for output in deepspeed_support.run_ranks(script, tmp_path):
        assert "done" in output
