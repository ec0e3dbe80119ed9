"""What a pass of the guard's own must not set off in ZeRO stage 3, nor leave behind."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support
from campaign.models import PlainMixture
from deepspeed_support import weights

BAD = 3


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.mixture = PlainMixture(16)
        self.head = nn.Linear(16, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixture(self.embedding(tokens)))


def train_sparse(setup, attach=None):
    """Trains six steps of which one is bad; returns the guard and the weights."""
    torch.manual_seed(0)
    model = Sparse()
    deepspeed.utils.set_z3_leaf_modules(model, [PlainMixture])
    engine = support.make_engine(setup, stage=3, model=model, gradient_clipping=0.0)
    guard = attach(engine) if attach else None
    for step in range(1, 7):
        if step == BAD:
            ng.inject(engine, "gradient", "mixture.gate.weight", step=1)
        support.train_step(engine, step)
    return guard, weights(engine)


@pytest.mark.parametrize("setup", ["fp16", "bf16"])
def test_a_leaf_module_reduces_nothing_in_a_pass_of_the_guard(attach, setup):
    _, expected = train_sparse(setup)
    guard, trained = train_sparse(setup, attach)
    assert [record.applied for record in guard.history] == [step != BAD for step in range(1, 7)]
    assert guard.last_report.first.name == "mixture.gate.weight"
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_all_weights_can_be_gathered_after_a_bad_step(attach):
    """As for generation, or for an average of the weights. An embedding, which is given integers, stayed in use."""
    engine = support.make_engine("fp16", stage=3)
    guard = attach(engine)
    for step in range(1, 5):
        if step == BAD:
            ng.inject(engine, "gradient", "hidden.weight", step=1)
        support.train_step(engine, step)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            assert engine.module.embedding.weight.shape == (8, 16)
    assert [record.applied for record in guard.history] == [step != BAD for step in range(1, 5)]
    assert guard.last_report.step == BAD
