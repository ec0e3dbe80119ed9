"""Faults on purpose in any model; that they are found is what the tests of every integration show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng


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


def test_a_removed_fault_does_not_happen():
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
def test_what_cannot_be_planted_is_refused(arguments, message):
    with pytest.raises(ng.InvalidInput, match=message):
        ng.inject(Doubler(), **arguments)
    with pytest.raises(ng.InvalidInput, match="expected a model"):
        ng.inject(object(), "input")
