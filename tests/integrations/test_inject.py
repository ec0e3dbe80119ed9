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


class Net(nn.Module):
    """Two layers, one of which a part of the calls leaves out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, x, skip=False):
        y = self.first(x)
        return y if skip else self.second(y)


def bad(model):
    return [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


@pytest.mark.parametrize("kind", ["parameter", "input", "activation", "gradient"])
def test_an_evaluation_does_not_count_and_has_no_fault(kind):
    model, x = Net(), torch.ones(3, 2)
    where = {"parameter": "first.weight", "gradient": "first.weight", "activation": "first"}.get(kind)
    injection = ng.inject(model, kind, where, step=2)
    for number in (1, 2):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                for _ in range(3):
                    assert model(x).isfinite().all()
        assert not injection.planted
        model(x).sum().backward()
        assert injection.planted is (number == 2)
    with torch.no_grad():
        assert bool(model(x).isfinite().all()) is (kind != "parameter"), "a weight stays damaged"


def test_a_gradient_fault_comes_in_the_backward_pass_of_its_step():
    model, x = Net(), torch.ones(3, 2)
    injection = ng.inject(model, "gradient", "first.weight", step=2)
    losses = [model(x).sum() for _ in range(4)]
    assert not injection.planted
    for number in (0, 2, 1, 3):
        model.zero_grad()
        losses[number].backward()
        assert bad(model) == (["first.weight"] if number == 1 else [])
    assert injection.planted


def test_a_gradient_fault_does_not_wait_for_another_step():
    model, x = Net(), torch.ones(3, 2)
    injection = ng.inject(model, "gradient", "second.weight", step=1)
    model(x, skip=True).sum().backward()
    model(x).sum().backward()
    assert bad(model) == []
    assert not injection.planted
    injection.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.second.weight._backward_hooks


def test_what_was_not_changed_was_not_planted():
    model, x = Net(), torch.ones(3, 2)
    activation = ng.inject(model, "activation", "second")
    model(x, skip=True)
    assert not activation.planted, "the module was not called"
    optimizer = torch.optim.AdamW(model.parameters())
    guarded = ng.GuardedOptimizer(optimizer, model)
    state = ng.inject(guarded, "optimizer_state", "first.weight")
    model(x).sum().backward()
    assert not state.planted, "the optimizer has none yet"
    whole_numbers = ng.inject(nn.Embedding(3, 2), "input")
    assert not whole_numbers.planted
    embedding = nn.Embedding(3, 2)
    whole_numbers = ng.inject(embedding, "input")
    with pytest.raises(ng.InvalidInput, match="found no floating-point tensor"):
        embedding(torch.tensor([1]))
    assert not whole_numbers.planted


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
