"""Updates that make weights non-finite, under each class of DeepSpeed's optimizers; and in two processes."""

from __future__ import annotations

import math

import pytest
from engine_ranks import run_engines

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import KINDS, name_of

ALL_KINDS = [*KINDS, ("fp32", 0, False, "AdamW")]
each_kind = pytest.mark.parametrize("kind", ALL_KINDS, ids=name_of)


def engine_of(kind):
    setup, stage, offload, expected = kind
    engine = support.make_engine(setup, stage=stage, offload=offload)
    assert type(engine.optimizer).__name__ == expected
    return engine


def set_rate(engine, rate):
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def held(parameter):
    """What this rank holds of a weight."""
    return getattr(parameter, "ds_tensor", parameter).data


def train_until_known(engine, step):
    """A step, and on a GPU one more: nothing waits there for what was seen of an update."""
    support.train_step(engine, step)
    if support.DEVICE.type != "cpu":
        support.train_step(engine, step + 1)


def steps_of_the_report(step):
    """That of the update, or on a GPU the next one, whose loss is not finite."""
    return [step] if support.DEVICE.type == "cpu" else [step, step + 1]


@each_kind
def test_a_nan_learning_rate_is_named_in_its_step(attach, kind):
    engine = engine_of(kind)
    guard = attach(engine)
    support.train_step(engine, 0)
    support.train_step(engine, 1)
    set_rate(engine, math.nan)
    with pytest.raises(ng.NumericsError) as caught:
        train_until_known(engine, 2)
    report = caught.value.report
    assert report is guard.last_report
    assert report.step in steps_of_the_report(3)
    assert (report.verdict, report.recoverable) == (ng.Verdict.UPDATE_NONFINITE, False)
    assert report.first.name == "embedding.weight"
    text = " ".join(report.evidence)
    if report.step == 3:
        assert "7 of 7 weights turned non-finite in that update" in text
    else:
        assert "made by the update of step 3" in text
    assert "parameter group 0, as read at that update: lr=nan" in text
    assert "odd: lr is NaN" in text
    if kind[0] != "fp32":
        assert "its float32 master copy, which takes the updates, is not finite either" in text
    assert "file" not in report.advice
    assert [record.applied for record in guard.history][:3] == [True] * 3


@each_kind
def test_healthy_training_is_left_alone(attach, kind):
    engine = engine_of(kind)
    guard = attach(engine)
    for step in range(4):
        support.train_step(engine, step)
    assert guard.last_report is None
    assert guard.findings == []


HALVES = [kind for kind in KINDS if kind[0] == "fp16"]


@pytest.mark.parametrize("kind", HALVES, ids=name_of)
def test_a_copy_that_cannot_hold_its_master_is_told_apart(attach, kind):
    engine = engine_of(kind)
    attach(engine)
    support.train_step(engine, 0)
    set_rate(engine, 1e6)
    with pytest.raises(ng.NumericsError) as caught:
        train_until_known(engine, 1)
    report = caught.value.report
    assert report.step in steps_of_the_report(2)
    assert report.verdict is ng.Verdict.UPDATE_NONFINITE
    text = " ".join(report.evidence)
    assert "its float32 master copy is finite and reaches" in text
    assert "more than float16 holds (65504)" in text


@each_kind
def test_what_other_code_writes_between_steps_is_not_the_optimizers(attach, kind):
    engine = engine_of(kind)
    attach(engine)
    support.train_step(engine, 0)
    support.train_step(engine, 1)
    held(engine.module.hidden.weight).view(-1)[3] = math.nan
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine, 2)
    report = caught.value.report
    assert (report.step, report.verdict) == (3, ng.Verdict.WEIGHTS_NONFINITE)
    assert report.first.name == "hidden.weight"
    text = " ".join(report.evidence)
    assert "finite right after the update of step 2: code outside of the optimizer's updates has written it" in text


RANKS = """
engine = support.make_engine({setup!r}, stage={stage}, scale_power=8)
guard = ng.attach(engine)
support.train_step(engine, 0)
support.train_step(engine, 1)
for group in engine.optimizer.param_groups:
    group["lr"] = float("nan")
support.train_step(engine, 2)
print("FINDINGS", [(item.kind, item.step) for item in guard.findings])
try:
    support.train_step(engine, 3)
except ng.NumericsError as error:
    report = error.report
    print("FOUND", report.step, report.verdict, report.world_size, report.evidence[0], report.first.name)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 0), ("half", 1), ("half", 2), ("fp16", 3), ("bf16", 3)])
def test_ranks_agree_in_the_next_step_on_the_update_that_wrote_it(setup, stage):
    for output in run_engines(RANKS.format(setup=setup, stage=stage)):
        assert "FINDINGS [('update_nonfinite', 3)]" in output
        assert "FOUND 4 update_nonfinite 2 made by the update of step 3 embedding.weight" in output
