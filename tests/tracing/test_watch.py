"""The watch over operations: what is not finite is followed back to where it was made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from hallo_numguard.tracing.watch import OperationWatch, unwatched


def watched(loss_of, *inputs, model=None):
    """Returns the source of a loss and of its gradients, and whether the watch has seen everything."""
    model = nn.Linear(4, 4) if model is None else model

    def named():
        yield from (("parameter", name, tensor) for name, tensor in model.named_parameters())
        yield from (("buffer", name, tensor) for name, tensor in model.named_buffers())
        yield from (("input", f"x{place}", tensor) for place, tensor in enumerate(inputs))

    modules = list(model.named_modules())
    with OperationWatch.on(modules, named) as watch:
        loss = loss_of(model, *inputs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert not watch._has_failed
    return watch.source_of([loss, *gradients])


def test_finite_steps_have_no_source():
    assert watched(lambda model, x: model(x).square().mean(), torch.randn(3, 4)) is None


def test_the_first_operation_is_named_with_line_sample_and_what_it_was_given():
    x = torch.randn(3, 4)
    found = watched(lambda model, x: (model(x) / torch.tensor([[1.0], [0.0], [1.0]])).mean(), x)
    assert (found.kind, found.operation, found.phase, found.module) == ("operation", "aten.div.Tensor", "forward", None)
    assert found.sample == 1
    assert found.explanation.endswith("was divided by 0")
    assert found.is_singular
    assert "test_watch.py" in found.line


def test_a_backward_pass_is_named_by_the_line_of_its_forward_pass():
    def loss_of(model, x):
        zero = model(x) * 0
        return zero.sqrt().mean()

    found = watched(loss_of, torch.randn(3, 4))
    assert (found.phase, found.node) == ("backward", "SqrtBackward0")
    assert "zero.sqrt()" in found.line


@pytest.mark.parametrize("hide", [torch.nan_to_num, lambda y: y.clamp(max=1), lambda y: torch.where(y < 2, y, 0)])
def test_what_is_hidden_in_the_forward_pass_is_the_source(hide):
    found = watched(lambda model, x: hide((model(x) + 1000).exp()).mean(), torch.randn(3, 4))
    if found is not None:  # nan_to_num cuts its gradient off
        assert (found.operation, found.phase) == ("aten.exp.default", "forward")
        assert found.hidden_by


MASKS = {
    "filled": lambda scores: scores.masked_fill(torch.tensor([True] * 4), float("-inf")),
    "added": lambda scores: scores + torch.full((4,), float("-inf")),
    "assigned": lambda scores: scores.clone().index_fill_(1, torch.arange(4), float("-inf")),
    "a logarithm of zeros": lambda scores: scores + torch.zeros(4).log(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_not_blamed_but_the_softmax_of_a_row_that_is_masked_throughout(mask):
    found = watched(lambda model, x: MASKS[mask](model(x)).softmax(-1).mean(), torch.randn(3, 4))
    assert found.operation == "aten._softmax.default"
    assert found.fill
    assert "is masked throughout" in found.explanation


def test_minus_infinity_among_measured_numbers_is_blamed():
    x = torch.randn(3, 4)
    x[1, 2] = float("-inf")
    found = watched(lambda model, x: model(x).mean(), x)
    assert (found.kind, found.name, found.tensor.index) == ("input", "x0", (1, 2))


def test_bad_weights_and_buffers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    model[1].running_mean[2] = float("nan")
    assert watched(lambda model, x: model(x).mean(), torch.randn(3, 4), model=model).name == "1.running_mean"
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert watched(lambda model, x: model(x).mean(), torch.randn(3, 4), model=model).name == "0.bias"


def test_a_large_weight_is_named_with_what_overflowed():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)
    found = watched(lambda model, x: model(x).mean(), torch.full((3, 4), 2.0), model=model)
    assert found.large == "parameter weight holds numbers of up to 3e+38"


@pytest.mark.parametrize("reentrant", [False])  # a reentrant one gives no gradients by name
def test_a_part_that_is_computed_again_is_one_of_the_forward_pass(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda y: torch.log(self.inner(y) * 0).clamp(min=-1), x, use_reentrant=reentrant)

    found = watched(lambda model, x: model(x).mean(), torch.randn(3, 4), model=Checkpointed())
    assert (found.operation, found.phase) == ("aten.log.default", "forward")


def test_memory_that_is_used_again_has_no_past():
    def loss_of(model, x):
        for _ in range(20):
            (model(x) / 0).detach()
        return model(x).mean()

    assert watched(loss_of, torch.randn(3, 4)) is None


def test_in_place_operations_and_views_are_followed():
    def loss_of(model, x):
        y = model(x).clone()
        y[0, :2].div_(0)
        return y.view(-1).mean()

    found = watched(loss_of, torch.randn(3, 4))
    assert found.operation == "aten.div_.Tensor"


def test_what_is_not_watched_leaves_no_trace():
    def loss_of(model, x):
        with unwatched():
            (model(x) / 0).sum()
        return model(x).mean()

    assert watched(loss_of, torch.randn(3, 4)) is None


def test_results_are_the_same_bits():
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    plain = gradients()
    with OperationWatch.on(model.named_modules(), list):
        seen = gradients()
    assert all(map(torch.equal, plain, seen))


@pytest.mark.parametrize("kind", ["parameter", "input"])
def test_the_index_is_that_in_the_named_tensor_and_not_in_a_view_of_it(kind):
    model, x = nn.Linear(3, 4, bias=False), torch.ones(5, 4)
    held = model.weight.data if kind == "parameter" else x
    held[3, 1] = torch.nan
    named = [(kind, "held", model.weight if kind == "parameter" else x)]
    with OperationWatch.on([("", model)], lambda: named) as watch:
        output = x[2:, :3] @ model.weight.t() if kind == "parameter" else x.t()[:3] @ torch.ones(5, 2)
    source = watch.source_of([output])
    assert (source.kind, source.name) == (kind, "held")
    assert (source.tensor.shape, source.tensor.index) == (tuple(held.shape), (3, 1))


@pytest.fixture
def group():
    if dist.is_initialized():  # by another test's engine, which keeps it
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("is_ours", [False, True])
def test_what_comes_out_of_a_collective_is_no_tensor_from_outside(group, is_ours):
    def loss_of(model, x):
        hidden = model(x) / (0 if is_ours else 1)
        dist.all_reduce(hidden.detach())
        if not is_ours:  # another rank has given it
            with unwatched():
                hidden.data[1, 2] = torch.inf
        return (hidden * 2).mean()

    found = watched(loss_of, torch.randn(3, 4))
    assert (found.kind, found.is_received, found.collectives) == ("operation", not is_ours, 0 if is_ours else 1)
    assert found.operation == ("aten.div.Tensor" if is_ours else "c10d.allreduce_.default")
