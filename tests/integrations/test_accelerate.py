"""attach() to an Accelerator without DeepSpeed: what only its scripts do; test_contract.py has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

from campaign.models import UNet

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("cpu_alone")


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_step_that_the_script_gives_up_after_clipping(clip):
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard = ng.attach(accelerator)
    for step in range(1, 5):
        accelerator.backward(model(torch.ones(2, 4)).mean() * (float("inf") if step == 2 else 1))
        getattr(accelerator, clip)(model.parameters(), 1.0)
        if step != 2:
            optimizer.step()
        optimizer.zero_grad()
    assert [record.applied for record in guard.history] == [True, False, True, True]
    assert guard.last_report is None
    assert torch.isfinite(model.weight).all()
    guard.detach()


def test_several_optimizers_are_guarded_each():
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    models = [nn.Linear(4, 4), UNet()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    guard = ng.attach(accelerator)
    for step in range(1, 4):
        for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
            arguments, _ = UNet.batch(torch.Generator().manual_seed(step), torch.float32)
            output = model(torch.randn(3, 4)) if isinstance(model, nn.Linear) else model(*arguments)
            accelerator.backward(output.square().mean() * (float("nan") if step == 2 and model is models[1] else 1))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert [record.applied for record in guard.history] == [True, True, True, True, False, True]
    assert guard.last_report.step == 2
    guard.detach()
    assert not {"backward", "clip_grad_norm_", "clip_grad_value_"} & vars(accelerator).keys()
    assert not any("step" in vars(optimizer) for optimizer in prepared[2:])
    guard = ng.attach(accelerator)
    with pytest.raises(ng.InvalidInput, match="guarded already"):
        ng.attach(accelerator)
    guard.detach()


def test_what_cannot_be_guarded_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ng.InvalidInput, match=r"after accelerator\.prepare"):
        ng.attach(accelerator)
    model = nn.Linear(2, 2)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ng.InvalidInput, match="no model that its optimizer trains"):
        ng.attach(accelerator)
    accelerator.prepare(model)
    guard = ng.attach(accelerator)
    with pytest.raises(ng.InvalidInput, match="takes no closure"):
        optimizer.step(lambda: None)
    guard.detach()
    other = accelerate.Accelerator(cpu=True)
    other.prepare(model, ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model))
    with pytest.raises(ng.InvalidInput, match="guarded already"):
        ng.attach(other)
