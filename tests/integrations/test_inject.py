"""Faults on purpose: what is planted is what is found, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import KINDS, name_of

EACH = [kind for kind in KINDS if kind[0] != "half"]


def train(engine, steps):
    for step in range(steps):
        support.train_step(engine, step)


@pytest.fixture
def guarded():
    guards = []

    def build(kind, **options):
        setup, stage, offload, _ = kind
        engine = support.make_engine(setup, stage=stage, offload=offload, **options)
        guards.append(ng.attach(engine))
        return engine, guards[-1]

    yield build
    for guard in guards:
        guard.detach()


@pytest.mark.parametrize("kind", EACH, ids=name_of)
@pytest.mark.parametrize(
    ("what", "verdict"),
    [("parameter", "weights_nonfinite"), ("optimizer_state", "optimizer_state_nonfinite")],
)
def test_damage_that_stays_is_named(guarded, kind, what, verdict):
    engine, guard = guarded(kind)
    injection = ng.inject(engine, what, "output.weight", (3, 17), step=3)
    train(engine, 2)
    assert not injection.planted
    assert all(record.applied for record in guard.history)
    with pytest.raises(ng.NumericsError) as caught:
        train(engine, 3)
    assert injection.planted
    first = caught.value.report.first
    assert caught.value.report.verdict.value == verdict
    assert (first.kind, first.name, first.index) == (what, "output.weight", (3, 17))


@pytest.mark.parametrize("kind", EACH, ids=name_of)
def test_a_bad_gradient_is_bad_once(guarded, kind):
    engine, guard = guarded(kind)
    ng.inject(engine, "gradient", "hidden.weight", (20, 5), step=2)
    train(engine, 4)
    assert [record.applied for record in guard.history] == [True, False, True, True]
    assert [(one.name, one.index) for one in guard.last_report.offenders] == [("hidden.weight", (20, 5))]


def test_a_bad_activation_is_bad_once(guarded):
    engine, guard = guarded(("bf16", 2, False, None))
    ng.inject(engine, "activation", "norm", (1, 2, 3), step=2)
    train(engine, 3)
    assert [record.applied for record in guard.history] == [True, False, True]
    assert guard.last_report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert (guard.last_report.first.kind, guard.last_report.first.name) == ("activation", "norm")


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))

    def forward(self, ids, x):
        return {"y": x * self.scale, "ids": ids}


def test_inputs_and_buffers_of_any_model():
    model, ids, x = Doubler(), torch.arange(2), torch.ones(3, 2)
    injection = ng.inject(model, "input", index=(1, 0), value=float("inf"), step=2)
    results = [model(ids, x=x)["y"] for _ in range(3)]
    assert injection.planted
    assert torch.isfinite(x).all(), "the caller's own tensor is not touched"
    assert [int((~torch.isfinite(y)).sum()) for y in results] == [0, 1, 0]
    assert torch.isinf(results[1][1, 0])
    ng.inject(model, "buffer", "scale", (1,))
    assert torch.isnan(model(ids, x=x)["y"][:, 1]).all()


def test_what_is_removed_does_not_happen():
    model = Doubler()
    injection = ng.inject(model, "buffer", "scale")
    injection.remove()
    model(torch.arange(2), x=torch.ones(3, 2))
    assert not injection.planted
    assert torch.isfinite(model.scale).all()


def test_another_rank_is_left_alone():
    model = Doubler()
    injection = ng.inject(model, "buffer", "scale", rank=7)
    model(torch.arange(2), x=torch.ones(3, 2))
    assert not injection.planted
    assert torch.isfinite(model.scale).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosmic_ray"}, "kind must be one of parameter, .*got 'cosmic_ray'"),
        ({"kind": "parameter", "where": "nowhere"}, "name of a parameter .*'nowhere'"),
        ({"kind": "buffer"}, "name of a buffer .*None; it has scale"),
    ],
)
def test_what_cannot_be_planted_is_said(arguments, message):
    with pytest.raises(ng.InvalidInput, match=message):
        ng.inject(Doubler(), **arguments)
    with pytest.raises(ng.InvalidInput, match="expected a model"):
        ng.inject(object(), "input")
