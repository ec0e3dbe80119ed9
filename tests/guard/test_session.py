"""The session on its own: a second adapter, for a plain PyTorch loop, is what the tests of this file are made with."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard import named_tensors
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.session import Session
from hallo_numguard.ops.api import multi_tensor_stats


class PlainLoop:
    """An adapter in thirty lines: gradients are `parameter.grad`, a step is skipped by not making it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: ng.GuardConfig) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = named_tensors.named_parameters(model)
        described = GuardedModel(
            self.parameters,
            named_tensors.named_buffers(model),
            sliced_gradients=False,
            scan_state=self._scan_state,
            sliced_state=False,
            device=torch.device("cpu"),
            module=model,
        )
        self.session = Session(described, Ranks(), config, None)
        self.session.inspect_weights("attached")
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.session.on_forward_start((x,), {})
        return self.model(x)

    def step(self, loss: torch.Tensor) -> None:
        self.session.on_loss(loss)
        loss.backward()
        self.steps += 1
        held = [(p, position) for position, p in enumerate(self.parameters) if p.tensor.grad is not None]
        table = multi_tensor_stats([p.tensor.grad for p, _ in held])
        scanned = ScannedPieces(table, [Piece(position, 0) for _, position in held])
        self.session.before_step(self.steps, LossScaling(1.0, dynamic=False), scanned)
        error = None
        skip = self.session.found_inf()
        if skip:
            error = self.session.overflow()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.after_step(applied=not skip)
        if error is not None:
            raise error

    def _scan_state(self) -> ScannedPieces:
        parts = [
            (value, Piece(position, 0))
            for position, item in enumerate(self.parameters)
            for value in self.optimizer.state.get(item.tensor, {}).values()
            if value.shape == item.tensor.shape
        ]
        return ScannedPieces(multi_tensor_stats([value for value, _ in parts]), [piece for _, piece in parts])


@pytest.fixture
def loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return PlainLoop(model, torch.optim.AdamW(model.parameters()), ng.GuardConfig())


def loss_of(loop, seed=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return loop.model(x).square().mean()


def test_clean_steps(loop):
    for seed in range(3):
        loop.step(loss_of(loop, seed))
    assert loop.session.last_report is None
    assert [record.applied for record in loop.session.history()] == [True] * 3


def test_a_damaged_weight(loop):
    loop.step(loss_of(loop))
    with torch.no_grad():
        loop.model[2].weight[0, 3] = float("nan")
    with pytest.raises(ng.NumericsError) as caught:
        loop.step(loss_of(loop))
    assert caught.value.report.verdict is ng.Verdict.WEIGHTS_NONFINITE
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("2.weight", (0, 3))


def test_a_damaged_moment(loop):
    loop.step(loss_of(loop))
    loop.optimizer.state[loop.model[0].bias]["exp_avg"][5] = float("inf")
    with pytest.raises(ng.NumericsError) as caught:
        for seed in range(3):
            loop.step(loss_of(loop, seed))
    assert caught.value.report.verdict is ng.Verdict.OPTIMIZER_STATE_NONFINITE
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("0.bias", (5,))


def test_a_gradient_born_bad_is_skipped_and_the_next_step_is_not(loop):
    before = loop.model[0].weight.clone()
    loop.step(loss_of(loop) + (loop.model[0].weight[1, 1] * 0.0).sqrt())  # the derivative at 0 is infinite, times 0
    assert torch.equal(loop.model[0].weight, before)
    assert loop.session.last_report.verdict is ng.Verdict.BACKWARD_NONFINITE
    assert loop.session.last_report.first.name == "0.weight"
    loop.step(loss_of(loop))
    assert not torch.equal(loop.model[0].weight, before)


def test_the_monitor_needs_no_framework():
    code = "import sys, hallo_numguard.guard.session; print([m for m in ('deepspeed', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
