"""Muon, which makes its update of gradient and momentum before gradients are checked."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

import deepspeed_support as support
from campaign.cases import FAULTY_STEP, Case, problems

pytestmark = pytest.mark.deepspeed

MUON = MappingProxyType({"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}})  # DeepSpeed's Adam is compiled


@pytest.fixture(autouse=True)
def not_compiled():
    """Muon's products of matrices are as they are written, for torch.compile takes its time."""
    support.single_process_environment()
    support.allow_fp16()
    with torch.compiler.set_stance("force_eager"):
        yield


def run(fault, setup, stage):
    from campaign import worker  # which asks for the rank

    case = Case(fault, "transformer", setup, stage, False, 1)
    zero = {"stage": stage, "reduce_bucket_size": 500, "reduce_scatter": False}  # with it DeepSpeed refuses Muon
    return case, worker.run(case, optimizer_of=lambda _: None, optimizer=dict(MUON), zero_optimization=zero)


@pytest.mark.parametrize("fault", ["none", "gradient"])
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 2), ("bf16", 3)])
def test_muon(fault, setup, stage):
    case, seen = run(fault, setup, stage)
    assert seen.alone in (None, "runs")
    assert problems(case, [seen]) == []


@pytest.mark.parametrize(("setup", "stage"), [("bf16", 1), ("fp16", 2), ("fp16", 3)])
def test_a_bad_momentum_is_the_cause_of_a_bad_gradient(setup, stage):
    case, seen = run("optimizer_state", setup, stage)
    assert (seen.verdict, seen.recoverable, seen.raised) == ("optimizer_state_nonfinite", False, True)
    assert seen.first == ("optimizer_state", *seen.planted, case.culprit)
    assert seen.applied == (True,) * (FAULTY_STEP - 1) + (False,)
    assert seen.finite  # no weight has it


def test_a_bad_momentum_that_no_check_sees_is_named_after_the_update():
    _, seen = run("optimizer_state", "bf16", 0)
    assert (seen.verdict, seen.raised) == ("optimizer_state_nonfinite", True)
    assert seen.first[:2] == ("optimizer_state", seen.planted[0])
