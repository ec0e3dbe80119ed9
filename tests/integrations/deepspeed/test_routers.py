"""Routers of a mixture of experts: what stays wrong with them is a finding, in a real layer of DeepSpeed's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

import hallo_numguard as ng
from hallo_numguard.integrations.deepspeed.experts import routers_of

import deepspeed_support as support

GATE = "moe.deepspeed_moe.gate"
EXPERTS, TOKENS, WIDTH = 8, 64, 16


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.moe = MoE(WIDTH, expert, num_experts=EXPERTS, use_rts=False, min_capacity=1, **options)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y, balance, _ = self.moe(x)
        return self.head(x + y), balance


def groups_of(model):
    return split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})


@pytest.fixture
def trained():
    """Trains a layer, whose gate is prepared by a function of its weight; returns the guard and the model."""
    support.single_process_environment()
    guards = []

    def train(prepare=lambda weight: None, steps=64, **options):
        torch.manual_seed(0)
        model = Model(**options)
        with torch.no_grad():
            prepare(model.moe.deepspeed_moe.gate.wg.weight)
        engine = support.make_engine("bf16", stage=1, model=model, groups_of=groups_of)
        guard = ng.attach(engine, ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn")))
        guards.append(guard)
        for step in range(steps):
            x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step)).bfloat16()
            x[:, 0] = 4.0
            output, balance = engine(x)
            engine.backward(output.float().square().mean() + 0.01 * balance.float())
            engine.step()
        return guard, model

    yield train
    for guard in guards:
        guard.detach()


def all_choose_the_first(weight):
    weight.mul_(0.01)
    weight[0, 0] = 2.0


def is_sure(weight):
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 100)
    weight[:, 0] = 0


@pytest.mark.parametrize("k", [1, 2])
def test_a_router_near_balance_is_left_alone(trained, k):
    guard, _ = trained(k=k)
    assert guard.findings == []


@pytest.mark.parametrize("k", [1, 2])
def test_tokens_that_no_expert_takes(trained, k):
    guard, _ = trained(all_choose_the_first, k=k, capacity_factor=1.0 / k)
    (found,) = guard.findings
    assert (found.kind, found.name, found.step) == ("tokens_dropped", GATE, 32)
    chosen, capacity = k * TOKENS, TOKENS // EXPERTS
    assert f"of {chosen} choices of an expert found it full" in found.message
    assert int(found.message.split()[4]) >= TOKENS - capacity


def test_where_none_are_dropped_all_may_choose_the_same(trained):
    guard, _ = trained(all_choose_the_first, drop_tokens=False)
    assert guard.findings == []


def test_a_router_that_is_sure_of_every_choice(trained):
    guard, _ = trained(is_sure, drop_tokens=False)
    (found,) = guard.findings
    assert (found.kind, found.name, found.step) == ("router_saturated", GATE, 32)
    assert "logits reach" in found.message


def test_logits_that_overflow_are_named_by_the_gate(trained):
    guard, _ = trained(lambda weight: weight.fill_(3e38), steps=1)
    report = guard.last_report
    assert report.verdict == "forward_nonfinite"
    assert GATE in report.first.name


def test_a_gate_is_read_alike_with_dense_and_with_sparse_routes(trained):
    _, model = trained(steps=1)
    (router,) = routers_of(SimpleNamespace(module=model))
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    outputs = [router.module(x), router.module(x, sparse_routes=True)]
    assert [len(output) for output in outputs] == [4, 7]
    dense, sparse = (router.read((x,), output) for output in outputs)
    assert int(dense.capacity) == int(sparse.capacity) == TOKENS // EXPERTS
    assert torch.equal(dense.chosen, sparse.chosen)
    assert int(dense.chosen.sum()) == TOKENS


def test_nothing_is_left_of_the_hooks(trained):
    guard, model = trained(steps=1)
    gate = model.moe.deepspeed_moe.gate
    assert len(gate._forward_hooks) == 1
    guard.detach()
    assert not gate._forward_hooks
