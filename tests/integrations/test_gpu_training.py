"""A guarded optimizer on a GPU: what it waits for, and what it names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

from gpu import NEEDS_GPU, host_sync_is_an_error

pytestmark = NEEDS_GPU


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.last = nn.Linear(64, 8)
        self.scale = 1.0

    def forward(self, x):
        return self.last(torch.log(self.scale * self.norm(self.first(x)).square() + 1e-3))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 32, generator=generator).cuda() for _ in range(count)]


def build(guarded, fused=True):
    torch.manual_seed(0)
    model = Network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    return model, ng.GuardedOptimizer(optimizer, model) if guarded else optimizer


def train(model, optimizer, inputs, scaler=None, dtype=None):
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
            loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_clean_training_has_the_same_bits(fused, dtype):
    found = []
    for guarded in (False, True):
        model, optimizer = build(guarded, fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12) if dtype is torch.float16 else None
        found.append(torch.stack(train(model, optimizer, batches(20), scaler, dtype)))
        if guarded:
            assert optimizer.last_report is None
            assert all(record.applied for record in optimizer.history)
    assert torch.equal(*found)


def test_a_fused_step_waits_for_nothing():
    model, optimizer = build(True)
    train(model, optimizer, batches(10))
    inputs = batches(10, seed=1)
    with host_sync_is_an_error():
        train(model, optimizer, inputs)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_batch_is_named_and_does_no_harm(fused):
    model, optimizer = build(True, fused)
    inputs = batches(8)
    inputs[4][3, 7] = torch.nan
    train(model, optimizer, inputs)
    guard = optimizer
    assert guard.last_report.verdict is ng.Verdict.INPUT_NONFINITE
    assert guard.last_report.first.index == (3, 7)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert [record.applied for record in guard.history] == [step != 4 for step in range(8)]


@pytest.mark.parametrize("fused", [True, False])
def test_the_operation_that_made_the_first_nan_is_named(fused):
    model, optimizer = build(True, fused)
    train(model, optimizer, batches(3))
    model.scale = -1.0
    train(model, optimizer, batches(2, seed=1))
    report = optimizer.last_report
    assert report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert "log" in str(report)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_scaler_that_is_too_high_comes_down():
    model, optimizer = build(True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    train(model, optimizer, batches(40), scaler, torch.float16)
    assert optimizer.history[-1].applied
    assert optimizer.last_report.verdict is ng.Verdict.SCALE_TOO_HIGH
