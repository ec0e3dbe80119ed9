"""A part of the guard that fails costs that part: the run goes on, and the next NaN is still found."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard import containment
from hallo_numguard.guard.containment import Probes, contain_failures

PARTS = {
    "record of the batch": ("_batch", ("add", "note_output")),
    "flight recorder": ("_recorder", ("begin",)),
    "early warnings": ("_warnings", ("before_step", "after_step")),
    "trackers": ("_feed", ("write",)),
}


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


@pytest.mark.contains_failures
def test_a_probe_that_fails_is_switched_off_alone(caplog: pytest.LogCaptureFixture) -> None:
    probes = Probes()
    with caplog.at_level(logging.ERROR, "hallo_numguard"):
        assert [probes.run("first", fail), probes.run("first", lambda: 1), probes.run("second", lambda: 2)] == [
            None,
            None,
            2,
        ]
    (record,) = caplog.records
    assert record.getMessage() == (
        "hallo_numguard failed in its first: it is switched off, all else stays on guard; training goes on. "
        f"RuntimeError: planted (test_containment.py:{fail.__code__.co_firstlineno + 1}, in fail)"
    )
    assert record.exc_info is None, "one line on the console"
    assert [probe for probe, _ in containment.contained] == ["first"]


@pytest.mark.contains_failures
def test_a_traceback_is_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hallo_numguard"):
        Probes().run("first", fail)
    assert [(record.levelname, record.exc_info is not None) for record in caplog.records] == [
        ("ERROR", False),
        ("DEBUG", True),
    ]


def test_what_the_user_raises_to_end_the_run_is_not_contained() -> None:
    with pytest.raises(KeyboardInterrupt), contain_failures("probe", "nothing"):
        raise KeyboardInterrupt


def test_an_interrupt_switches_no_probe_off() -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    probes = Probes()
    with pytest.raises(KeyboardInterrupt):
        probes.run("first", interrupt)
    assert probes.run("first", lambda: 1) == 1


@pytest.mark.contains_failures
@pytest.mark.parametrize("part", PARTS)
def test_a_run_goes_on_without_the_part_and_the_next_nan_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    owner, methods = PARTS[part]
    for method in methods:
        monkeypatch.setattr(getattr(optimizer._guard.session, owner), method, fail)

    def train_step() -> None:
        optimizer.zero_grad()
        optimizer.watch_loss(model(torch.randn(16, 4)).square().mean()).backward()
        optimizer.step()

    for _ in range(3):
        train_step()
    assert {probe for probe, _ in containment.contained} == {part}
    with torch.no_grad():
        model[2].weight[0, 3] = float("nan")
    with pytest.raises(ng.NumericsError) as caught:
        train_step()
    assert caught.value.report.first is not None
    assert caught.value.report.first.name == "2.weight"
    failure = caught.value.report.environment["guard_failures"][0]
    assert failure.startswith(f"{part}: Traceback (most recent call last)"), "whole in the report"
    assert "RuntimeError: planted" in failure
    assert ng.OverflowReport.from_json(caught.value.report.to_json()) == caught.value.report
    assert not torch.isnan(model[0].weight).any()
