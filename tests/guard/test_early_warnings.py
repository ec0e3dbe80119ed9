"""What the guard notices before anything overflows: each rule with a run that breaks it, and clean runs that do not."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard.step.early_warnings import Spikes


def make_optimizer(model=None, lr=1e-3):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=lr), model)


def step(optimizer, loss):
    optimizer.watch_loss(loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model, optimizer, steps, scale=lambda number: 1.0):
    for number in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        step(optimizer, (model(x) - x.sum(1, keepdim=True)).square().mean() * scale(number))


def kinds(optimizer):
    return [(finding.kind, finding.name, finding.step) for finding in optimizer.findings]


def test_a_clean_run_finds_nothing_in_2000_steps():
    model, optimizer = make_optimizer()
    train(model, optimizer, 2000)
    assert optimizer.findings == []
    assert optimizer.last_report is None


def test_a_spike_of_loss_and_norm_is_found_once():
    model, optimizer = make_optimizer()
    train(model, optimizer, 60, scale=lambda number: 300.0 if number in (40, 41) else 1.0)
    assert {kind for kind, *_ in kinds(optimizer)} == {"norm_spike", "loss_spike"}
    assert [number for *_, number in kinds(optimizer)] == [41, 41], "steps count from 1, and the same is not said twice"
    assert "where the median of the steps before is" in str(optimizer.findings[0])


def test_spikes_know_a_noisy_figure_from_a_quiet_one():
    chance = random.Random(0)
    noisy = Spikes(min_deviation=0.1)
    assert not any(noisy.median_before(chance.lognormvariate(0, 1.5)) for _ in range(5000))
    signed = Spikes(min_deviation=0.05)
    assert not any(signed.median_before(chance.gauss(0, 3)) for _ in range(5000))
    assert signed.median_before(100.0) is not None
    quiet = Spikes(min_deviation=0.05)
    assert not any(quiet.median_before(chance.lognormvariate(0, 0.01)) for _ in range(50))
    assert quiet.median_before(4.0) == pytest.approx(1.0, rel=0.02)
    assert quiet.median_before(float("inf")) is None, "overflows are for reports"


def test_a_learning_rate_too_high():
    model, optimizer = make_optimizer(lr=0.5)
    train(model, optimizer, 4)
    finding = next(item for item in optimizer.findings if item.kind == "update_ratio")
    assert finding.step == 1
    assert finding.name in ("0.weight", "2.weight")
    assert "the learning rate is too high" in finding.message


class Dead(nn.Module):
    """The hidden layer's ReLU never opens."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.output = nn.Linear(8, 1)
        nn.init.constant_(self.hidden.bias, -1e3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.relu(self.hidden(x)))


def test_a_dead_layer():
    model, optimizer = make_optimizer(Dead())
    train(model, optimizer, 20)
    found = [item for item in kinds(optimizer) if item[0] == "dead_gradient"]
    assert ("dead_gradient", "hidden.weight", 8) in found
    assert ("dead_gradient", "output.bias", 8) not in found


def test_an_exploding_layer():
    model, optimizer = make_optimizer()
    train(model, optimizer, 15)
    model[0].weight.register_hook(lambda gradient: gradient * 1e5)
    train(model, optimizer, 2)
    assert ("exploding_gradient", "0.weight", 16) in kinds(optimizer)


def test_an_input_out_of_range():
    model, optimizer = make_optimizer()
    train(model, optimizer, 7)
    step(optimizer, model(torch.full((16, 4), 255.0)).square().mean() * 1e-4)
    found = [item for item in optimizer.findings if item.kind == "input_range"]
    assert [(item.name, item.step) for item in found] == [("input", 8)]
    assert "reaches 255" in found[0].message


def test_an_input_that_clean_steps_had_as_well_is_not_to_blame():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            known = ~torch.isnan(target)
            return (self.layer(x)[known] - target[known]).square().mean()

    model, optimizer = make_optimizer(Masked())
    target = torch.full((16, 1), float("nan"))
    target[:8] = 1.0
    for number in range(4):
        x = torch.randn(16, 4)
        if number == 3:
            x[5, 2] = float("inf")
        step(optimizer, model(x, target=target))
    report = optimizer.last_report
    assert report.verdict is ng.Verdict.INPUT_NONFINITE
    assert (report.first.kind, report.first.name, report.first.index) == ("input", "x", (5, 2))
    assert report.recoverable


@pytest.mark.parametrize(("dtype", "found_in"), [(torch.float32, 2), (torch.float16, 8)])
def test_steps_that_change_nothing(dtype, found_in):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)).to(dtype)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model)

    def clip(*_):
        for parameter in model.parameters():
            parameter.grad.zero_()  # as by a norm of Inf

    hook = optimizer._optimizer.register_step_pre_hook(clip)
    for number in range(10):
        step(optimizer, model(torch.ones(16, 4, dtype=dtype) * (number + 1)).float().square().mean())
    hook.remove()
    assert kinds(optimizer) == [("lost_update", "", found_in)]
    assert "clipping (a norm of Inf makes every gradient 0)" in str(optimizer.findings[0])


def test_a_warm_up_that_begins_at_zero_is_no_finding():
    model, optimizer = make_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer._optimizer, lambda number: number / 100)
    for number in range(20):
        train(model, optimizer, 1, scale=lambda _, number=number: 1 + 0.01 * number)
        schedule.step()
    assert optimizer.findings == []


def test_weights_of_norms_that_bfloat16_cannot_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)).bfloat16()
    model, optimizer = make_optimizer(model, lr=1e-4)
    for number in range(10):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number)).bfloat16()
        step(optimizer, (model(x) - x.sum(1, keepdim=True)).float().square().mean())
    assert [(kind, number) for kind, _, number in kinds(optimizer)] == [("lost_update", 8)]
    assert "1.weight" in str(optimizer.findings[0])
    assert "smaller than what bfloat16 can add to them" in str(optimizer.findings[0])


def test_a_bad_step_that_was_applied_all_the_same_is_told():
    model, optimizer = make_optimizer()
    train(model, optimizer, 2)
    (model(torch.full((2, 4), float("nan"))).sum()).backward()
    assert optimizer._guard.check().bad
    optimizer._guard.done(applied=True)  # as where a framework decides by itself, and makes the step
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert ("bad_step_applied", "", 3) in kinds(optimizer)
