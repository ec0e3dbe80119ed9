"""Steps of more micro-batches than the guard keeps: those that it names are counted from the step's first one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard.step.pending import MAX_CALLS

WARN = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
COUNT = MAX_CALLS + 6


class Regression(nn.Module):
    """A module whose derivative is NaN for large numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        y = torch.tanh(self.first(x))
        if x.amax() > 100:
            y = y + (y - y).sqrt()
        return self.last(y).square().mean()


@pytest.fixture
def guarded(make):
    return make("fp32", WARN, stage=2, model=Regression(), gradient_accumulation_steps=COUNT)


def step(engine, bad, value):
    for micro_batch in range(COUNT):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(micro_batch)).to(engine.device)
        if micro_batch == bad:
            x[1, 2] = value
        engine.backward(engine(x))
        engine.step()


def test_one_that_is_kept(guarded):
    engine, guard = guarded
    step(engine, COUNT - 2, float("nan"))
    report = guard.last_report
    assert (report.verdict, report.first.kind, report.first.index) == ("input_nonfinite", "input", (1, 2))
    assert any(f"micro-batch {COUNT - 2} of the step" in line for line in report.evidence), report
    step(engine, COUNT - 3, 1000.0)
    report = guard.last_report
    assert report.verdict == "backward_nonfinite"
    assert any(f"the batch (micro-batch {COUNT - 3}), run again" in line for line in report.evidence), report


def test_one_that_is_not(guarded):
    engine, guard = guarded
    step(engine, 3, float("nan"))
    report = guard.last_report
    assert (report.verdict, report.first.kind, report.first.index) == ("undetermined", "loss", (3,))
    assert any("more micro-batches than are kept" in line for line in report.evidence), report
    assert not any("what the model was called with is finite" in line for line in report.evidence), report
