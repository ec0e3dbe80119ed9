"""Steps that are watched because one before them stayed unexplained, and steps that can be run again as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hallo_numguard as ng

GOES_ON = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000))


def modes() -> int:
    return torch._C._len_torch_dispatch_stack()


class Loop:
    """A loop whose loss divides by the sum of weights that are 0 in some steps."""

    def __init__(self, guarded: bool = True, wraps: bool = False, model: nn.Module | None = None, call=None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)) if model is None else model
        self.call = self.model if call is None else call
        self.reports = []
        plain = torch.optim.SGD(self.model.parameters(), 0.1)
        add = self.reports.append
        self.optimizer = ng.GuardedOptimizer(plain, self.call, GOES_ON, add) if guarded else plain
        self.loss_of = self.optimizer.wrap_step(self._loss_of) if wraps else self._loss_of

    def _loss_of(self, x, weights):
        each = self.call(x).square().mean(1)
        return (each * weights / weights.sum()).sum()

    def step(self, number: int, is_bad: bool = False) -> None:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        loss = self.loss_of(x, torch.zeros(6) if is_bad else torch.ones(6))
        self.optimizer.zero_grad()
        loss.backward()
        if is_bad and isinstance(self.optimizer, torch.optim.SGD):
            return
        self.optimizer.step()


def test_the_next_bad_step_names_operation_and_line():
    loop = Loop()
    for number in range(1, 7):
        loop.step(number, is_bad=number in (2, 4))
    first, second = loop.reports
    assert first.verdict is ng.Verdict.UNDETERMINED
    assert "it came in after the model" in first.summary
    assert any("autograd has recorded: div" in line for line in first.evidence)
    assert "The next 3 steps are watched" in first.advice
    assert second.verdict is ng.Verdict.LOSS_NONFINITE
    assert second.first.operation == "aten.div.Tensor"
    assert "(each * weights / weights.sum()).sum()" in second.first.line
    assert second.known_from == "this step, which was watched operation by operation"


def test_a_step_function_needs_one_occurrence():
    loop = Loop(wraps=True)
    for number in range(1, 4):
        loop.step(number, is_bad=number == 2)
    (report,) = loop.reports
    assert (report.verdict, report.known_from) == ("loss_nonfinite", "the whole step, run again")
    assert "(each * weights / weights.sum()).sum()" in report.first.line


@pytest.mark.parametrize("wraps", [False, True])
def test_training_has_the_same_bits(wraps):
    plain, guarded = Loop(guarded=False), Loop(wraps=wraps)
    for loop in (plain, guarded):
        torch.manual_seed(1)
        for number in range(1, 9):
            loop.step(number, is_bad=number in (2, 5))
    assert len(guarded.reports) == 2
    assert all(map(torch.equal, plain.model.parameters(), guarded.model.parameters()))


def test_nothing_is_left_on_after_a_step():
    loop = Loop()
    for number in range(1, 9):
        loop.step(number, is_bad=number in (2, 3, 4))
        assert modes() == 0
        assert not torch.is_anomaly_enabled()


def test_a_step_inside_of_a_mode_of_the_user_is_not_watched():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    loop = Loop()
    loop.step(1, is_bad=True)
    with Mode():
        loop.step(2, is_bad=True)
    assert modes() == 0
    assert [report.verdict for report in loop.reports] == ["undetermined", "undetermined"]


def test_an_evaluation_after_a_step_that_was_not_made_is_not_watched():
    loop = Loop()
    loop.step(1, is_bad=True)
    loop.model(torch.randn(2, 4))  # armed, and no step follows
    loop.optimizer.detach()
    assert modes() == 0


def test_a_compiled_model_draws_the_same_numbers_in_a_step_that_is_watched():
    def run(guarded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        loop = Loop(guarded, model=model, call=torch.compile(model, backend="aot_eager"))
        torch.manual_seed(1)
        for number in range(1, 7):
            loop.step(number, is_bad=number in (2, 4))
        return loop

    plain, guarded = run(False), run(True)
    assert guarded.reports[1].first.operation == "aten.div.Tensor"
    assert all(map(torch.equal, plain.model.parameters(), guarded.model.parameters()))


def test_only_the_compiled_model_is_not_finite():
    class Differs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y / x.abs().sum(1, keepdim=True) if torch.compiler.is_compiling() else y

    model = Differs()
    loop = Loop(model=model, call=torch.compile(model, backend="aot_eager"))
    x = torch.randn(6, 4)
    for row in (x, x.index_fill(0, torch.tensor(2), 0.0)):
        loop.call(row).square().mean().backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    (report,) = loop.reports
    assert (report.verdict, report.known_from) == ("forward_nonfinite", "both runs")
    assert "run eagerly, the same batch is finite" in report.summary


def test_a_label_that_is_not_finite_is_an_input_of_the_step():
    model = nn.Linear(4, 2)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, GOES_ON)
    step = optimizer.wrap_step(lambda x, target: (model(x) - target).square().mean())
    target = torch.randn(6, 2)
    target[3, 1] = float("nan")
    step(torch.randn(6, 4), target).backward()
    optimizer.step()
    first = optimizer.last_report.first
    assert optimizer.last_report.verdict is ng.Verdict.INPUT_NONFINITE
    assert (first.name, first.index, first.sample) == ("target", (3, 1), 3)
