"""Where DeepSpeed itself is blind: each case first without the guard, to see the damage, then with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import name_of, plant_in_gradient, weights


class Branches(nn.Module):
    """Takes one branch or the other: the parameters of the other one take no part in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(self.stem(x))


def train(engine, step, left):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(next(engine.module.parameters()))
    loss = engine(x, left).float().square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def a_bad_step_then_steps_without_that_branch(engine):
    for step in range(2):
        train(engine, step, left=step == 0)
    handle = engine.module.left.weight.register_hook(plant_in_gradient((3, 2)))
    train(engine, 2, left=True)
    handle.remove()
    for step in range(3, 8):
        train(engine, step, left=False)


STALE_NAN_IS_APPLIED = [
    ("fp16", 2, True, None),
    ("bf16", 2, True, None),
    ("bf16", 3, True, None),
]
STALE_NAN_SKIPS_FOR_EVER = [("fp16", 3, False, None), ("bf16", 3, False, None)]


def make(kind, **options):
    setup, stage, offload, _ = kind
    return support.make_engine(setup, stage=stage, offload=offload, model=Branches(), **options)


def is_finite(engine):
    return all(torch.isfinite(value).all() for value in weights(engine).values())


@pytest.mark.parametrize("kind", STALE_NAN_IS_APPLIED, ids=name_of)
def test_a_nan_of_a_skipped_step_does_not_come_back(attach, kind):
    engine = make(kind)
    a_bad_step_then_steps_without_that_branch(engine)
    assert not is_finite(engine), "DeepSpeed no longer applies it: the guard need not look after it any more"

    engine = make(kind)
    guard = attach(engine)
    a_bad_step_then_steps_without_that_branch(engine)
    assert is_finite(engine)
    assert [record.applied for record in guard.history] == [True, True, False, True, True, True, True, True]


@pytest.mark.parametrize("kind", STALE_NAN_SKIPS_FOR_EVER, ids=name_of)
def test_one_bad_step_is_not_skipped_twice(attach, kind):
    engine = make(kind, scale_power=16)
    a_bad_step_then_steps_without_that_branch(engine)
    assert engine.skipped_steps == 6, "DeepSpeed no longer skips them: the guard need not look after it any more"

    engine = make(kind, scale_power=16)
    attach(engine)
    a_bad_step_then_steps_without_that_branch(engine)
    assert engine.skipped_steps == 1
    assert is_finite(engine)


def a_bad_gradient(engine, steps=1):
    support.train_step(engine, 0)
    handle = dict(engine.module.named_parameters())["hidden.weight"].register_hook(plant_in_gradient((2, 3)))
    for step in range(steps):
        support.train_step(engine, step + 1)
    handle.remove()


def test_stage_0_in_float32_has_no_check_so_the_guards_decision_stands(attach):
    engine = support.make_engine("fp32", stage=0)
    a_bad_gradient(engine)
    assert not is_finite(engine)

    engine = support.make_engine("fp32", stage=0)
    guard = attach(engine)
    a_bad_gradient(engine)
    assert is_finite(engine)
    assert [record.applied for record in guard.history] == [True, False]
    assert (guard.last_report.first.name, guard.last_report.first.index) == ("hidden.weight", (2, 3))
    support.train_step(engine, 2)
    assert guard.history[-1].applied


CHECK_DISABLED = {"bf16": {"enabled": True, "check_grad_overflow": False}}


def test_a_check_that_the_user_switched_off_is_not_overruled_but_reported(attach):
    engine = support.make_engine("bf16", **CHECK_DISABLED)
    guard = attach(engine)
    a_bad_gradient(engine)
    assert not is_finite(engine), "as the user said"
    assert guard.history[-1].applied
    assert guard.last_report.consecutive_skips == 0
    assert any("applied all the same" in line for line in guard.last_report.evidence)


def test_it_is_overruled_if_the_policy_says_so(attach):
    engine = support.make_engine("bf16", **CHECK_DISABLED)
    guard = attach(engine, ng.GuardConfig(policy=ng.Policy(enforce=True)))
    a_bad_gradient(engine)
    assert is_finite(engine)
    assert not guard.history[-1].applied


@pytest.mark.parametrize(("setup", "stage"), [("bf16", 2), ("bf16_fp32", 1), ("bf16", 0), ("bf16", 3), ("fp32", 0)])
def test_skips_without_scaling_end_with_an_error(attach, setup, stage):
    engine = support.make_engine(setup, stage=stage)
    guard = attach(engine, ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=4)))
    with pytest.raises(ng.NumericsError) as caught:
        a_bad_gradient(engine, steps=20)
    assert caught.value.report.consecutive_skips == 4
    assert [record.applied for record in guard.history] == [True, *[False] * 4]


def test_the_scale_is_kept_where_it_is_not_to_blame(attach):
    engine = support.make_engine("fp16")
    attach(engine, ng.GuardConfig(policy=ng.Policy(keep_scale=True)))
    before = engine.optimizer.loss_scale
    for step in range(3):
        support.train_step(engine, step, poison=float("inf"))
    assert engine.optimizer.loss_scale == before
    assert engine.skipped_steps == 3
