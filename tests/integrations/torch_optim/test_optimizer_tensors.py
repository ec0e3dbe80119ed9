"""GuardedOptimizer with integer, complex, sparse and wrapped tensors: nothing is refused, bad numbers are found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from unusual_tensors import EightBit, LowRank, Opaque, Quantized

import hallo_numguard as ng
from hallo_numguard.guard import containment

NAN = float("nan")
STEPS = 6


def batch(step, bad=False):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    if bad:
        x[1, 2] = NAN
    return x


def train(model, optimizer, steps=range(1, STEPS + 1), bad=None, scaler=None):
    for step in steps:
        loss = model(batch(step, step == bad)).square().mean()
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def made(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def same_weights(left, right):
    return all(torch.equal(one, other) for one, other in zip(left.parameters(), right.parameters(), strict=True))


def not_checked(guard):
    return [finding.message for finding in guard.findings if finding.kind == "not_checked"]


# -- frozen integers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_parameters", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_frozen_integers_are_said_once_and_train_as_without_a_guard(all_parameters, clip_norm):
    def optimizer_of(model):
        chosen = [p for p in model.parameters() if all_parameters or p.requires_grad]
        return torch.optim.AdamW(chosen, lr=0.01)

    plain, model = made(LowRank), made(LowRank)
    optimizer = ng.GuardedOptimizer(optimizer_of(model), model, clip_norm=clip_norm)
    train(model, optimizer)
    if clip_norm is None:
        train(plain, optimizer_of(plain))
        assert same_weights(plain, model)
    assert not_checked(optimizer) == [
        "3 tensors are not checked, because they hold integers: base.codes, base.signed, base.mask"
    ]
    assert [finding.severity for finding in optimizer.findings] == ["info"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.findings) == 1
    train(model, optimizer, range(7, 9), bad=8)
    report = optimizer.last_report
    assert (report.verdict, report.first.name, report.first.index) == ("input_nonfinite", "x", (1, 2))


def test_a_bad_complex_weight_is_named(caplog):
    model = made(LowRank)
    with torch.no_grad():
        model.base.phase[2] = complex(0, NAN)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.down.parameters(), lr=0.1), model)
    (finding,) = [finding for finding in optimizer.findings if finding.kind == "nonfinite"]
    assert (finding.offender.name, finding.offender.index, finding.offender.nan) == ("base.phase", (2,), 1)


class Spectral(nn.Module):
    """A trained complex weight."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8))


def test_complex_weights_are_trained_with_the_same_bits():
    plain, model = made(Spectral), made(Spectral)
    train(plain, torch.optim.Adam(plain.parameters()))
    optimizer = ng.GuardedOptimizer(torch.optim.Adam(model.parameters()), model)
    train(model, optimizer)
    assert same_weights(plain, model)
    assert optimizer.findings == []
    norm = float(torch.linalg.vector_norm(model.filter.grad))
    assert optimizer.history[-1].parameters["filter"].norm == pytest.approx(norm, rel=1e-5)
    model.filter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), complex(NAN, 0)))
    train(model, optimizer, [9])
    assert optimizer.last_report is not None
    assert [(bad.name, bad.index) for bad in optimizer.last_report.offenders] == [("filter", (3,))]


# -- sparse gradients -------------------------------------------------------------------------------------------------


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8, sparse=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        tokens = torch.tensor([1, 5, 1, 9])
        return self.out(self.table(tokens) + x)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad], ids=["sgd", "adagrad"])
def test_sparse_gradients_are_trained_with_the_same_bits(make):
    plain, model = made(Recommender), made(Recommender)
    train(plain, make(plain.parameters(), lr=0.1))
    optimizer = ng.GuardedOptimizer(make(model.parameters(), lr=0.1), model)
    train(model, optimizer)
    assert same_weights(plain, model)
    assert optimizer.findings == []
    whole = torch.linalg.vector_norm(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    assert optimizer.history[-1].norm == pytest.approx(float(whole), rel=1e-5)


def test_the_bad_row_of_a_sparse_gradient_is_named():
    model = made(Recommender)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = copy.deepcopy(model.state_dict())

    def plant(gradient):
        values = gradient._values().clone()
        values[3, 2] = NAN  # of token 9
        return torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape)

    model.table.weight.register_hook(plant)
    train(model, optimizer, [1])
    bad = optimizer.last_report.offenders[0]
    assert (bad.name, bad.index, bad.nan) == ("table.weight", (9, 2), 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_counts_sparse_gradients_once_for_each_row(scaled):
    model, plain = made(Recommender), made(Recommender)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, clip_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    train(model, optimizer, [1], scaler=scaler)
    plain(batch(1)).square().mean().backward()
    gradients = [p.grad.to_dense() for p in plain.parameters()]
    factor = 0.01 / float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])))
    for parameter, before, gradient in zip(model.parameters(), plain.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before - factor * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("when", ["on_alarm", "always"])
def test_embeddings_with_an_optimizer_of_their_own(when):
    """The step after an alarm reads every gradient as the backward pass makes it, that of the embedding too."""
    model, plain = made(Recommender), made(Recommender)
    config = ng.GuardConfig(local_gradients=when)
    guarded = ng.GuardedOptimizer(torch.optim.AdamW(model.out.parameters()), model, config)
    others = torch.optim.SparseAdam(list(model.table.parameters()))
    pair = torch.optim.AdamW(plain.out.parameters()), torch.optim.SparseAdam(list(plain.table.parameters()))
    for step in range(1, 8):
        bad = step in (3, 5)
        for net, optimizers in ((model, (guarded, others)), (plain, pair)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net(batch(step, bad)).square().mean().backward()
            if not (bad and net is plain):
                optimizers[0].step()
            if not bad:
                optimizers[1].step()
    assert same_weights(plain, model)
    assert (guarded.last_report.verdict, guarded.last_report.step) == ("input_nonfinite", 5)


def test_both_optimizers_of_a_model_may_be_guarded():
    model = made(Recommender)
    dense = ng.GuardedOptimizer(torch.optim.AdamW(model.out.parameters()), model)
    sparse = ng.GuardedOptimizer(torch.optim.SparseAdam(list(model.table.parameters())), model)
    for step in range(1, 6):
        dense.zero_grad()
        sparse.zero_grad()
        model(batch(step, step == 4)).square().mean().backward()
        dense.step()
        sparse.step()
    for optimizer in (dense, sparse):
        assert (optimizer.last_report.verdict, optimizer.last_report.step) == ("input_nonfinite", 4)
        assert not_checked(optimizer) == []
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_gradient_that_is_sparse_in_some_steps_only():
    model = made(Recommender)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(1, 7):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        if step % 2:
            loss = loss + model.table.weight.square().mean()  # with a dense gradient the sum is dense
        loss.backward()
        assert model.table.weight.grad.is_sparse == (step % 2 == 0)
        optimizer.step()
    assert [record.step for record in optimizer.history] == [1, 2, 3, 4, 5, 6]


# -- states of optimizers ---------------------------------------------------------------------------------------------


def test_a_state_of_eight_bits_is_read_by_its_scales():
    model, plain = made(LowRank), made(LowRank)

    def optimizer_of(net):
        return EightBit([p for p in net.parameters() if p.requires_grad])

    train(plain, optimizer_of(plain))
    inner = optimizer_of(model)
    optimizer = ng.GuardedOptimizer(inner, model)
    train(model, optimizer)
    assert same_weights(plain, model)
    optimizer._guard.state_was_loaded()
    assert not_checked(optimizer)[-1] == (
        "2 tensors are not checked, because they hold integers: state1 of down.weight, state1 of up.weight"
    )
    assert {finding.severity for finding in optimizer.findings} == {"info"}
    inner.state[model.up.weight]["absmax1"][1] = NAN
    optimizer._guard.state_was_loaded()
    (finding,) = [finding for finding in optimizer.findings if finding.kind == "nonfinite"]
    assert (finding.offender.kind, finding.offender.name) == ("optimizer_state", "up.weight")
    assert finding.offender.index == (4, 0)  # the first of the 8 elements that it scales


class WrappedMomentum(torch.optim.SGD):
    """Keeps its momentum in a wrapper subclass."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            momentum = self.state[parameter].get("exp_avg")
            momentum = parameter.grad if momentum is None else 0.9 * momentum.dequantize() + parameter.grad
            self.state[parameter]["exp_avg"] = Quantized.of(momentum)
            self.state[parameter]["step"] = 1
            parameter.sub_(0.01 * momentum)


def test_a_state_of_a_wrapper_subclass_is_read_inside():
    model = made(LowRank)
    inner = WrappedMomentum([p for p in model.parameters() if p.requires_grad])
    optimizer = ng.GuardedOptimizer(inner, model)
    train(model, optimizer, bad=4)
    assert (optimizer.last_report.verdict, optimizer.last_report.step) == ("input_nonfinite", 4)
    optimizer._guard.state_was_loaded()
    assert len(optimizer.findings) == 1  # of the frozen integers
    inner.state[model.up.weight]["exp_avg"].scale[2] = NAN
    optimizer._guard.state_was_loaded()
    (finding,) = [finding for finding in optimizer.findings if finding.kind == "nonfinite"]
    assert (finding.offender.name, finding.offender.index) == ("up.weight", (4, 0))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "scalar", "expanded"])
def test_moments_of_any_strides(layout):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            values = {
                "channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
                "transposed": torch.randn(4, 6).t(),
                "scalar": torch.randn(()),
                "expanded": torch.randn(2, 3),
            }
            self.weight = nn.Parameter(values[layout])

        def forward(self, x):
            return x.sum() * self.weight

    model = made(Strided)
    inner = torch.optim.Adam(model.parameters())
    optimizer = ng.GuardedOptimizer(inner, model)
    train(model, optimizer, range(1, 4))
    state = inner.state[model.weight]
    if layout == "expanded":
        state["exp_avg"] = torch.zeros(2, 1).expand(2, 3)
    last = tuple(size - 1 for size in model.weight.shape)
    optimizer._guard.state_was_loaded()
    assert optimizer.findings == []
    if layout == "expanded":
        state["exp_avg"] = torch.tensor([[0.0], [NAN]]).expand(2, 3)
        last = (1, 0)
    else:
        state["exp_avg"][last] = NAN
    optimizer._guard.state_was_loaded()
    (finding,) = optimizer.findings
    assert (finding.offender.kind, finding.offender.index) == ("optimizer_state", last)


# -- weights and inputs -----------------------------------------------------------------------------------------------


class WithWrapped(nn.Module):
    """A frozen weight in a wrapper subclass, as quantization libraries make them, and one that nothing is known of."""

    def __init__(self, opaque=False):
        super().__init__()
        self.weight = nn.Parameter(Quantized.of(torch.randn(8, 8)), requires_grad=False)
        self.up = nn.Linear(8, 8)
        if opaque:
            self.secret = nn.Parameter(Opaque(torch.ones(3)), requires_grad=False)

    def forward(self, x):
        return self.up(x @ self.weight.dequantize())


def test_the_scales_of_a_wrapped_weight_are_read():
    model = made(WithWrapped)
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.up.parameters()), model)
    train(model, optimizer, bad=4)
    assert optimizer.findings == []
    assert optimizer.last_report.verdict == "input_nonfinite"
    model = made(WithWrapped)
    model.weight.scale[3] = NAN
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.up.parameters()), model)
    (finding,) = optimizer.findings
    assert (finding.offender.name, finding.offender.index) == ("weight", (1, 4))
    with pytest.raises(ng.NumericsError) as caught:
        train(model, optimizer, [1])
    assert (caught.value.report.verdict, caught.value.report.first.name) == ("weights_nonfinite", "weight")


def test_a_weight_that_cannot_be_read_at_all_is_named():
    torch.manual_seed(0)
    model = WithWrapped(opaque=True)
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.up.parameters()), model)
    train(model, optimizer, bad=4)
    assert not_checked(optimizer) == [
        "1 tensor is not checked, because a Opaque shows no floating-point tensor inside: secret"
    ]
    assert optimizer.last_report.verdict == "input_nonfinite"


class Graph(nn.Module):
    """Takes an adjacency matrix that is sparse, integers, and an image of a class of its own."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 1)

    def forward(self, adjacency, kind, x):
        return self.out(torch.sparse.mm(adjacency, x.as_subclass(torch.Tensor)))


@pytest.mark.parametrize("where", ["adjacency", "x"])
def test_bad_inputs_of_other_kinds_are_named(where):
    from unusual_tensors import Labelled

    torch.manual_seed(0)
    model = Graph()
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    for step in range(1, 5):
        adjacency = torch.eye(4).to_sparse().coalesce()
        x = torch.randn(4, 8).as_subclass(Labelled)
        if step == 4 and where == "x":
            x[2, 3] = NAN
        if step == 4 and where == "adjacency":
            adjacency.values()[2] = NAN
        optimizer.zero_grad()
        model(adjacency, torch.arange(4), x).square().mean().backward()
        optimizer.step()
    report = optimizer.last_report
    index = {"adjacency": (2, 2), "x": (2, 3)}[where]
    assert (report.verdict, report.first.name, report.first.index) == ("input_nonfinite", where, index)
    assert optimizer.findings == []


# -- parameters that come later, or from elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("named", ["model", "names"])
def test_learnt_loss_weights_outside_of_the_model(named):
    model = made(LowRank)
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad]}, {"params": [weight]}])
    optimizer = ng.GuardedOptimizer(inner, model if named == "model" else model.named_parameters())
    for step in range(1, 5):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        (loss * torch.exp(-weight[0]) + weight.sum() + (NAN * weight[1] if step == 4 else 0.0)).backward()
        optimizer.step()
    assert "param_groups[1][0]" in optimizer.history[0].parameters
    assert optimizer.last_report.offenders[0].name == "param_groups[1][0]"
    assert weight.isfinite().all()


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("when", ["on_alarm", "always"])
def test_a_group_that_is_added_later_is_guarded(directly, when):
    model, extra = made(LowRank), nn.Linear(8, 8)
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer = ng.GuardedOptimizer(inner, model, ng.GuardConfig(local_gradients=when))
    train(model, optimizer, range(1, 4), bad=2)
    report, findings = optimizer.last_report, list(optimizer.findings)
    (inner if directly else optimizer).add_param_group({"params": list(extra.parameters())})
    for step in range(4, 8):
        optimizer.zero_grad()
        loss = extra(model(batch(step))).square().mean()
        (loss * (NAN if step == 6 else 1.0)).backward()
        optimizer.step()
    assert optimizer.findings == findings  # and those of before are still there
    assert [record.step for record in optimizer.history] == [1, 2, 3, 4, 5, 6, 7]
    assert optimizer.history[-1].parameters["param_groups[1][0]"].norm > 0
    assert report.step == 2
    assert optimizer.last_report.step == 6
    names = {gradient.name for gradient in optimizer.last_report.offenders}
    assert {"param_groups[1][0]", "param_groups[1][1]"} <= names
    assert all(parameter.isfinite().all() for parameter in extra.parameters())
    pickled = copy.deepcopy(optimizer)
    assert len(pickled.param_groups) == 2


def test_a_module_that_is_added_later_keeps_its_name():
    model = made(LowRank)
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), model)
    train(model, optimizer, [1])
    model.head = nn.Linear(8, 8)
    optimizer._optimizer.add_param_group({"params": list(model.head.parameters())})
    model.head.weight.grad = torch.full((8, 8), NAN)
    optimizer.step()
    assert [gradient.name for gradient in optimizer.last_report.offenders] == ["head.weight"]


def test_a_first_group_without_parameters():
    model = made(LowRank)
    groups = [{"params": []}, {"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(groups, fused=True), model)
    train(model, optimizer)
    assert len(optimizer.history) == STEPS


@pytest.mark.contains_failures
def test_a_failure_to_add_parameters_costs_their_names_alone(monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    model, extra = made(LowRank), nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer = ng.GuardedOptimizer(inner, model)
    train(model, optimizer, [1])
    monkeypatch.setattr(optimizer._guard.session, "add_parameters", fail)
    optimizer.add_param_group({"params": [extra]})
    for step, factor in ((2, 1.0), (3, NAN)):
        optimizer.zero_grad()
        (model(batch(step)).square().mean() + factor * extra.sum()).backward()
        optimizer.step()
    assert [record.applied for record in optimizer.history] == [True, True, False]
    assert extra.isfinite().all()
    assert [probe for probe, _ in containment.contained] == ["addition of parameters"]


@pytest.mark.contains_failures
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_run_goes_on_if_the_gradients_cannot_be_listed(monkeypatch, clip_norm):
    def fail(*_):
        raise RuntimeError("planted")

    model, plain = made(Recommender), made(Recommender)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=clip_norm)
    train(model, optimizer, [1])
    monkeypatch.setattr(optimizer._guard._gradients, "collect", fail)
    train(model, optimizer, [2])
    monkeypatch.undo()
    train(plain, ng.GuardedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1), plain, clip_norm=clip_norm), [1, 2])
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)
    assert [probe for probe, _ in containment.contained] == ["search for the gradients"]
