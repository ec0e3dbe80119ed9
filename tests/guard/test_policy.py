"""What the log says of a report: all of it once, then a line for each that only repeats it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import hallo_numguard as ng


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture):
    """Trains, and returns what each step has logged."""
    caplog.set_level(logging.INFO, "hallo_numguard")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    reports: list[ng.OverflowReport] = []
    policy = ng.Policy(max_consecutive_skips=100)
    optimizer = ng.GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), model, ng.GuardConfig(policy=policy), reports.append
    )

    def train(x: torch.Tensor) -> str:
        caplog.clear()
        optimizer.zero_grad()
        optimizer.watch_loss(model(x).square().mean()).backward()
        optimizer.step()
        return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")

    return train, reports, model


def bad(row: int, column: int = 0) -> torch.Tensor:
    x = torch.ones(16, 4)
    x[row, column] = float("nan")
    return x


def test_the_same_report_again_is_one_line(run) -> None:
    train, reports, _ = run
    logged = [train(bad(row)) for row in range(4)]
    assert "what to do" in logged[0]
    assert [text.count("\n") for text in logged[2:]] == [0, 0]
    assert logged[3].endswith("; same as step 2, 2 times") or logged[3].endswith("; same as step 1, 3 times")
    assert "step 4 was skipped: input_nonfinite" in logged[3]
    assert len(reports) == 4, "callbacks get them all"


def test_another_report_is_logged_as_a_whole(run) -> None:
    train, _, model = run
    for row in range(3):
        train(bad(row))
    handle = model[0].register_forward_hook(lambda module, args, output: output * float("inf"))
    assert "what to do" in train(torch.ones(16, 4))
    handle.remove()
    assert "what to do" in train(bad(0))
