"""A guarded run goes on with the same bits as an unguarded one, also after an overflow and the replay of its batch."""

from __future__ import annotations

import os
import types

import pytest
import stochastic
import torch
from stochastic import KINDS, batch, differences, loss_of, seed, state_of
from torch import nn

import hallo_numguard as ng

STEPS = 40
HEALTHY = {"scale_too_high", "undetermined"}


def run(make, guarded, bad_step=None, compiled=False):
    """Trains in float16 with a loss scale that is too high at first; returns the state and the reports."""
    seed()
    model = make()
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    reports = []
    if guarded:
        optimizer = ng.GuardedOptimizer(optimizer, called, on_overflow=reports.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10)
    for step in range(STEPS):
        x, target = batch(step)
        if step == bad_step:
            x[3, 2] = float("nan")
        with torch.autocast("cpu", torch.float16):
            output = called(x)
        scaler.scale(loss_of(output, target)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if guarded:
        optimizer.detach()
    return {**state_of(model), "scale": scaler.get_scale()}, reports


@pytest.mark.parametrize("kind", KINDS)
def test_a_stochastic_model_trains_with_the_same_bits(kind):
    plain, _ = run(KINDS[kind], guarded=False)
    guarded, reports = run(KINDS[kind], guarded=True)
    assert differences(plain, guarded) == []
    assert len(reports) > 3
    assert {report.verdict for report in reports} == {"scale_too_high"}
    assert any("run again, this batch was finite" in line for report in reports for line in report.evidence)


def test_a_compiled_model_trains_with_the_same_bits():
    plain, _ = run(stochastic.Dropout, guarded=False, compiled=True)
    guarded, reports = run(stochastic.Dropout, guarded=True, compiled=True)
    assert differences(plain, guarded) == []
    assert {report.verdict for report in reports} <= HEALTHY


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("BatchNorm", "running scale")])
def test_a_bad_batch_and_its_replay_leave_no_trace(kind):
    plain, _ = run(KINDS[kind], guarded=False, bad_step=20)
    guarded, reports = run(KINDS[kind], guarded=True, bad_step=20)
    is_poisoned = not all(torch.isfinite(x).all() for x in plain.values() if isinstance(x, torch.Tensor))
    assert is_poisoned or differences(plain, guarded) == []
    assert "input_nonfinite" in {report.verdict for report in reports}


def test_running_statistics_that_a_bad_batch_has_poisoned_are_put_back():
    seed()
    model = stochastic.BatchNorm()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 0.01), model)
    for step in range(4):
        x, target = batch(step)
        if step == 2:
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            x[0] = float("inf")
        optimizer.watch_loss(loss_of(model(x), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    (finding,) = [finding for finding in optimizer.findings if finding.kind == "statistics_restored"]
    assert (finding.kind, finding.step) == ("statistics_restored", 3)
    assert "layers.1.running_mean, layers.1.running_var" in finding.message
    assert int(model.layers[1].num_batches_tracked) == 3


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 32)), nn.LeakyReLU(), nn.Linear(32, 1)
        )

    def forward(self, x):
        return self.layers(x)


def train_gan(guarded):
    seed()
    generator, discriminator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8)), Discriminator()
    models, reports = (generator, discriminator), []
    optimizers = [torch.optim.Adam(model.parameters(), 1e-3) for model in models]
    if guarded:
        optimizers = [
            ng.GuardedOptimizer(optimizer, model, on_overflow=reports.append)
            for optimizer, model in zip(optimizers, models, strict=True)
        ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=10)
    for step in range(STEPS):
        real, noise = batch(step)[0][:, :8], torch.randn(32, 4)
        for part, optimizer in zip(("discriminator", "generator"), optimizers[::-1], strict=True):
            with torch.autocast("cpu", torch.float16):
                fake = discriminator(generator(noise))
                score = fake - discriminator(real) if part == "discriminator" else -fake
            scaler.scale(score.float().square().mean() * 30).backward()
            scaler.step(optimizer)
            optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.update()
    return {**state_of(nn.ModuleList(models)), "scale": scaler.get_scale()}, reports


def test_a_gan_with_two_optimizers_trains_with_the_same_bits():
    plain, _ = train_gan(guarded=False)
    guarded, reports = train_gan(guarded=True)
    assert differences(plain, guarded) == []
    assert reports
    assert {report.verdict for report in reports} <= HEALTHY


class Sub(torch.Tensor):
    pass


class Output:
    def __init__(self, made):
        self.made = made


OUTPUTS = {
    "object": (Output, lambda output: output.made),
    "namespace": (lambda made: types.SimpleNamespace(made=made), lambda output: output.made),
    "subclass": (lambda made: made.as_subclass(Sub), lambda output: output),
    "iterator": (lambda made: iter([made]), lambda output: next(output)),
    "nested": (lambda made: [{"deep": (Output(made), None)}], lambda output: output[0]["deep"][0].made),
}


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = stochastic.body()
        self.kind = kind

    def forward(self, x):
        self.kept = self.layers(x)
        if self.kind == "kept":
            return self.kept.detach()
        return OUTPUTS[self.kind][0](self.kept)


@pytest.mark.parametrize("kind", [*OUTPUTS, "kept"])
def test_a_model_whose_output_is_hard_to_read_goes_on(kind):
    def trained(guarded):
        seed()
        model = Returns(kind)
        optimizer, reports = torch.optim.Adam(model.parameters(), 1e-3), []
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model, on_overflow=reports.append)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # more skipped steps than a policy takes in a row
        for step in range(STEPS):
            x, target = batch(step)
            with torch.autocast("cpu", torch.float16):
                output = model(x)
            made = model.kept if kind == "kept" else OUTPUTS[kind][1](output)
            scaler.scale(loss_of(made, target)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return state_of(model), reports

    (plain, _), (guarded, reports) = trained(False), trained(True)
    assert differences(plain, guarded) == []
    assert len(reports) > 10
    assert {report.verdict for report in reports} == {"scale_too_high"}
    if kind == "iterator":
        assert "the loss is finite" in reports[0].evidence
        assert "the model's output cannot be looked through: output" in str(reports[0]).replace("\n              ", " ")


class DrawsFromElsewhere(nn.Module):
    """Its randomness comes from where nobody can put it back."""

    def __init__(self):
        super().__init__()
        self.layers = stochastic.body()

    def forward(self, x):
        return self.layers(x) * (1 + os.urandom(1)[0])


def test_a_model_that_draws_from_elsewhere_is_run_again_once():
    seed()
    model = DrawsFromElsewhere()
    reports, calls = [], []
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 1e-4), model, on_overflow=reports.append)
    model.layers.register_forward_pre_hook(lambda *_: calls.append(len(reports)))
    for step in range(8):
        x, target = batch(step)
        penalty = (model.layers[0].weight * 0).norm() ** 0.5  # a gradient that is NaN
        (loss_of(model(x), target) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(reports) == 8
    assert len(calls) == 9
    assert "run again, the model returned something else" in str(reports[0])
    assert {report.first.operation for report in reports[1:]} == {
        "aten.pow.Tensor_Scalar"
    }  # from steps that were watched


def test_two_backward_passes_from_one_forward_pass_add_up():
    seed()
    model = stochastic.Dropout().half()
    with torch.no_grad():
        model.layers[3].weight.mul_(100)
    reports = []
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 1e-4), model, on_overflow=reports.append)
    output = model(batch(0)[0].half())
    (output.sum() * 30000).backward(retain_graph=True)
    output.sum().backward()  # finite: alone it would explain nothing
    optimizer.step()
    assert reports[0].verdict == "backward_nonfinite"


def test_a_penalty_outside_of_the_model_is_no_fault_of_the_hardware():
    seed()
    model = stochastic.Dropout()
    nn.init.zeros_(model.layers[3].weight)
    config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=100))
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 1e-4), model, config)
    for step in range(3):
        x, target = batch(step)
        loss = loss_of(model(x), target)
        penalty = sum(parameter.square().sum().sqrt() for parameter in model.parameters())
        (loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.last_report
    assert (report.verdict, report.first.name) == ("backward_nonfinite", "layers.3.weight")
    assert "that is outside of the model's call" in report.evidence
    assert "penalty = sum(" in report.first.line


class Recomputation(torch.autograd.Function):
    """Saves activations as some libraries do: its backward pass runs one of its own, which adds to gradients."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), gradient)
        return x.grad, None


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return Recomputation.apply(self.first(x), self.inner)


def test_a_replay_adds_to_no_gradient():
    added = {}
    for guarded in (False, True):
        torch.manual_seed(0)
        model = Recomputed()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model, ng.GuardConfig(policy=ng.Policy(enforce=True)))
        added[guarded] = 0

        def count(_, guarded=guarded):
            added[guarded] += 1

        model.inner.weight.register_post_accumulate_grad_hook(count)
        for step in range(3):
            handle = model.first.weight.register_hook(lambda gradient: gradient * torch.inf) if step == 1 else None
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if handle is not None:
                handle.remove()
    assert added == {False: 3, True: 3}
    assert any("could not be run again" in line for line in optimizer.last_report.evidence)
