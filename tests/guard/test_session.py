"""The session, which every integration shares: what it needs, and a fault that only a gradient shows."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

import hallo_numguard as ng


def test_a_gradient_born_bad_is_skipped_and_the_next_step_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    names = model.named_parameters()  # without the model, which cannot be run again then
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), names)
    before = model[0].weight.clone()
    for root in (True, False):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 4)).square().mean()
        if root:
            loss = loss + (model[0].weight[1, 1] * 0.0).sqrt()  # the derivative at 0 is infinite, times 0
        optimizer.watch_loss(loss).backward()
        optimizer.step()
        assert torch.equal(model[0].weight, before) == root
    assert optimizer.last_report.verdict is ng.Verdict.UNDETERMINED  # a forward value that was hidden may be the cause
    assert optimizer.last_report.first.name == "0.weight"


def test_the_session_needs_no_framework():
    code = "import sys, hallo_numguard.guard.session; print([m for m in ('deepspeed', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
