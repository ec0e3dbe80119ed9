"""Updates that make weights non-finite: each is named in its own step, with what is odd in it; other code is not it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hallo_numguard as ng

NAN, INF = math.nan, math.inf


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def batch(dtype=torch.float32):
    return torch.linspace(-1.0, 1.0, 32).reshape(4, 8).to(dtype)


def setting(step, **values):
    """A fault that sets values of the first parameter group before a step."""

    def plant(number, optimizer):
        if number == step:
            optimizer.param_groups[0].update(values)

    return plant


def healthy(*_):
    pass


def counter(number, optimizer):
    """The step counters are set back, so that the next update makes them 0."""
    if number == 3:
        for state in optimizer.state.values():
            state["step"].fill_(-1.0)


def negative_moment(number, optimizer):
    if number == 3:
        next(iter(optimizer.state.values()))["exp_avg_sq"][0, 0] = -1.0


class DividesByMovement(torch.optim.SGD):
    """As AdaSmooth once did: divides by how far a weight has moved, which is 0 for a bias that begins at 0."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad * parameter.abs().sum() / parameter.abs().sum())


def run(optimizer_of, plant=healthy, dtype=torch.float32, steps=6, model=None, config=None, between=None):
    """Trains; returns the report that it ended with, or None, and the guarded optimizer."""
    model = model or small(dtype)
    optimizer = ng.GuardedOptimizer(optimizer_of(model.parameters()), model, config)
    try:
        for number in range(1, steps + 1):
            plant(number, optimizer)
            optimizer.zero_grad()
            model(batch(dtype)).float().square().mean().backward()
            optimizer.step()
            if between is not None:
                between(number, model)
    except ng.NumericsError as error:
        return error.report, optimizer
    finally:
        optimizer.detach()
    return None, optimizer


def adam(**options):
    return lambda parameters: torch.optim.Adam(parameters, lr=1e-3, **options)


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 1e-3, **options})


FAULTS = {
    "a NaN learning rate": (adam(), setting(3, lr=NAN), torch.float32, 3, "lr is NaN"),
    "an infinite one": (sgd(), setting(2, lr=INF), torch.float32, 2, "lr is +Inf"),
    "one that overflows": (
        sgd(weight_decay=0.01),
        setting(3, lr=1e20, weight_decay=1e30),
        torch.float32,
        3,
        "lr is 1e+20",
    ),
    "a NaN tensor": (
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-3)),
        lambda number, optimizer: optimizer.param_groups[0]["lr"].fill_(NAN) if number == 3 else None,
        torch.float32,
        3,
        "lr is NaN",
    ),
    "eps in float16": (adam(), healthy, torch.float16, 1, "eps=1e-08 is 0 in float16"),
    "eps in float16, foreach": (adam(foreach=True), healthy, torch.float16, 1, "eps=1e-08 is 0 in float16"),
    "eps in float16, amsgrad": (adam(amsgrad=True), healthy, torch.float16, 1, "eps=1e-08 is 0 in float16"),
    "RMSprop's eps": (
        lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
        healthy,
        torch.float16,
        1,
        "eps=1e-08 is 0 in float16",
    ),
    "Adagrad's eps": (
        lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3),
        healthy,
        torch.float16,
        None,
        "eps=1e-10 is 0 in float16",
    ),
    "a bias correction of 0": (adam(fused=True), counter, torch.float32, 3, "the step counter is 0 after the update"),
    "a beta of 1": (adam(fused=True), setting(3, betas=(1.0, 0.999)), torch.float32, 3, "betas[0] is 1"),
    "a NaN beta": (adam(), setting(3, betas=(NAN, 0.999)), torch.float32, 3, "betas[0] is NaN"),
    "a huge weight decay": (
        sgd(weight_decay=0.01),
        setting(2, lr=30.0, weight_decay=6e4),
        torch.float16,
        2,
        "weight_decay is 60000",
    ),
    "a NaN weight decay": (adam(), setting(3, weight_decay=NAN), torch.float32, 3, "weight_decay is NaN"),
    "a negative second moment": (adam(), negative_moment, torch.float32, 3, "a second moment is not negative"),
    "a momentum above 1": (sgd(momentum=0.9), setting(2, momentum=1e9), torch.float16, 2, "momentum is 1e+09"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_that_makes_weights_nonfinite_is_named_in_its_step(fault):
    optimizer_of, plant, dtype, step, odd = FAULTS[fault]
    report, optimizer = run(optimizer_of, plant, dtype)
    assert report is not None
    assert (report.verdict, report.recoverable) == ("update_nonfinite", False)
    assert report.step == (step or report.step) == len(optimizer.history)
    assert optimizer.history[-1].applied  # in that step, not a later one
    text = " ".join(report.evidence)
    assert odd in text
    assert f"right before the update of step {report.step}" in text
    assert "parameter group 0" in text
    assert report.happened.startswith(f"The update of step {report.step} made ")
    assert "file" not in report.advice
    assert ng.OverflowReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_optimizer_without_its_fault_is_left_alone(fault):
    report, optimizer = run(FAULTS[fault][0])
    assert (report, optimizer.last_report, optimizer.findings) == (None, None, [])


def test_an_optimizer_of_ones_own_is_named_though_no_setting_is_odd():
    model = small()
    with torch.no_grad():
        model[0].bias.zero_()
    report, _ = run(lambda parameters: DividesByMovement(parameters, lr=1e-3), model=model)
    assert (report.step, report.verdict, report.first.name) == (1, "update_nonfinite", "0.bias")
    assert "nothing is odd in these settings" in report.evidence
    assert "DividesByMovement" in report.advice
    assert "1 of 4 weights turned non-finite in that update: 0.bias" in report.evidence


def test_the_group_is_named():
    model = small()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "name": "head"}]
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(groups, lr=1e-3), model)
    optimizer.param_groups[1]["lr"] = NAN
    model(batch()).square().mean().backward()
    with pytest.raises(ng.NumericsError) as caught:
        optimizer.step()
    assert caught.value.report.first.name == "2.weight"
    assert any(
        "AdamW, parameter group 1 (head), as read at that update: lr=nan" in line
        for line in caught.value.report.evidence
    )
    assert "2 of 4 weights turned non-finite in that update: 2.weight, 2.bias" in caught.value.report.evidence


def test_a_float16_weight_that_outgrows_its_dtype():
    model = small(torch.float16)
    with torch.no_grad():
        model[2].bias.fill_(65000.0)
    report, _ = run(sgd(), setting(1, lr=-0.1), dtype=torch.float16, model=model)
    assert (report.verdict, report.first.name) == ("update_nonfinite", "2.bias")
    assert "lr is -0.1, below 0" in " ".join(report.evidence)


WRITES = {
    "data": lambda weight: weight.data.__setitem__((1, 2), NAN),
    "copy_": lambda weight: weight.data.copy_(torch.full_like(weight, INF)),
    "set": lambda weight: setattr(weight, "data", weight.data * NAN),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_other_code_writes_between_steps_is_not_the_optimizers(way):
    def between(number, model):
        if number == 3:
            WRITES[way](model[0].weight)

    report, optimizer = run(adam(), between=between)
    assert (report.step, report.verdict, report.first.name) == (4, "weights_nonfinite", "0.weight")
    text = " ".join(report.evidence)
    assert "finite right after the update of step 3: code outside of the optimizer's updates has written it" in text
    assert "EMA" in report.advice
    assert "file" not in report.advice
    assert not optimizer.history[-1].applied


def test_what_other_code_writes_into_a_weight_that_no_loss_reads_is_told():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.unread = small(), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.net(x)

    def between(number, model):
        if number == 2:
            model.unread.data[1] = NAN

    report, optimizer = run(adam(), model=Unread(), between=between)
    assert report is None
    (finding,) = optimizer.findings
    assert (finding.kind, finding.name, finding.step) == ("nonfinite", "unread", 3)
    assert "finite right after the update of step 2: code outside of the optimizer's updates" in finding.message


def test_a_weight_that_was_bad_from_the_start_is_not_the_updates():
    model = small()
    model[2].weight.data[0, 3] = NAN
    report, _ = run(adam(), model=model)
    assert (report.step, report.verdict, report.first.name) == (1, "weights_nonfinite", "2.weight")
    assert (
        "2.weight was so already when the optimizer was guarded: no step of this run has made it so" in report.evidence
    )
    assert "it is in no file: initialise it" in report.advice


def test_a_buffer_that_no_checkpoint_has_is_in_no_file():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.register_buffer("frequencies", torch.tensor([1.0, NAN]), persistent=False)

        def forward(self, x):
            return self.net(x) * self.frequencies.sum()

    report, _ = run(adam(), model=Rotary())
    assert (report.verdict, report.first.name) == ("weights_nonfinite", "frequencies")
    assert "it is a non-persistent buffer, in no checkpoint or model file" in report.advice


def test_a_closure_and_a_scaler():
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=NAN), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(batch()).square().mean()).backward()
    with pytest.raises(ng.NumericsError) as caught:
        scaler.step(optimizer)
    assert (caught.value.report.step, caught.value.report.verdict) == (1, "update_nonfinite")

    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.LBFGS(model.parameters()), model)
    optimizer.param_groups[0]["lr"] = NAN

    def closure():
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ng.NumericsError) as caught:
        optimizer.step(closure)
    assert (caught.value.report.step, caught.value.report.verdict) == (1, "update_nonfinite")


def test_a_fused_optimizer_without_a_host_sync(monkeypatch):
    monkeypatch.setattr("hallo_numguard.integrations.torch_optim.guarded_optimizer.sync_is_costly", lambda _: True)
    report, _ = run(adam(fused=True), setting(3, lr=NAN))
    assert (report.step, report.verdict) == (3, "update_nonfinite")


def test_a_run_that_goes_on_says_so_again_in_the_next_step():
    config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
    report, optimizer = run(adam(), setting(3, lr=NAN), config=config, steps=4)
    report = report or optimizer.last_report
    assert (report.step, report.verdict, report.consecutive_skips) == (4, "update_nonfinite", 1)
    assert report.evidence[0] == "made by the update of step 3"


def test_a_run_goes_back_to_what_was_before_the_update(tmp_path):
    keeper = ng.CheckpointKeeper(tmp_path, healthy_after=1)
    model = small()
    policy = ng.Policy(on_unrecoverable="rollback")
    optimizer = ng.GuardedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, ng.GuardConfig(keeper=keeper, policy=policy)
    )
    for number in range(1, 8):
        optimizer.param_groups[0]["lr"] = NAN if number == 5 else 1e-3
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
        if number == 2:
            keeper.save({"optimizer": optimizer, "model": model})
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert (optimizer.last_report.step, optimizer.last_report.verdict) == (5, "update_nonfinite")


def test_never_looks_at_nothing():
    config = ng.GuardConfig(check_updates="never")
    report, _ = run(adam(), setting(3, lr=NAN), config=config)
    assert (report.step, report.verdict) == (4, "weights_nonfinite")
    assert not any("does not train it" in line for line in report.evidence)
    with pytest.raises(ng.InvalidInput, match="check_updates must be one of never, part, all"):
        ng.GuardConfig(check_updates="some")


def large(dtype=torch.float32):
    """Beyond what is always read whole, in 40 layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 300), *[nn.Linear(300, 300) for _ in range(40)], nn.Linear(300, 4)).to(dtype)


def test_of_many_weights_an_odd_setting_makes_all_be_looked_at():
    report, _ = run(adam(), setting(12, lr=NAN), model=large(), steps=13)
    assert (report.step, report.verdict) == (12, "update_nonfinite")
    assert "84 of 84 weights turned non-finite in that update" in report.evidence[0]


class WritesOnce(torch.optim.SGD):
    """Writes one NaN into one weight in one step."""

    def __init__(self, parameters, number):
        super().__init__(parameters, lr=1e-3)
        self.number, self.left = number, 12

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        self.left -= 1
        if self.left == 0:
            self.param_groups[0]["params"][self.number].view(-1)[5] = NAN


def wide():
    """One weight that is larger than a part, which is looked at in stretches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 300_000))


@pytest.mark.parametrize("looks", ["part", "all"])
@pytest.mark.parametrize("model_of", [large, wide])
def test_of_many_weights_nothing_is_said_that_was_not_seen(looks, model_of):
    config = ng.GuardConfig(check_updates=looks)
    said = set()
    for number in (0, 1, 40, 70) if model_of is large else (0,):
        report, _ = run(
            lambda parameters, at=number: WritesOnce(parameters, at), model=model_of(), steps=14, config=config
        )
        said.add((report.step, report.verdict))
        if report.verdict == "weights_nonfinite":
            assert "whether an update since then or other code wrote it was not seen" in " ".join(report.evidence)
            assert "file" not in report.advice
    seen = {(12, "update_nonfinite")}
    assert said == seen if looks == "all" else said <= {*seen, (13, "weights_nonfinite")}


def test_every_weight_has_its_turn():
    model = large()
    optimizer = ng.GuardedOptimizer(WritesOnce(model.parameters(), 0), model)
    optimizer.param_groups[0]["lr"] = 0.0
    watch = optimizer._guard.session._updates
    parts = [watch._parts[number] for number in range(watch._parts.count)]
    for _ in range(60):
        optimizer.zero_grad()
        optimizer._optimizer.left = 1000
        model(batch()).square().mean().backward()
        optimizer.step()
    assert 32 <= len(parts) < 60
    assert sorted({stretch.position for part in parts for stretch in part.stretches}) == list(range(84))
    assert min(watch._finite_at(position) for position in range(84)) >= 60 - len(parts)
    optimizer.detach()


def test_an_update_that_makes_weights_absurdly_large_is_told_in_its_step():
    _, optimizer = run(sgd(), setting(3, lr=3e38), steps=3)
    (finding,) = optimizer.findings
    assert (finding.kind, finding.step) == ("update_ratio", 3)
    assert "one update at a learning rate of 3e+38 (parameter group 0) made " in finding.message


def test_a_gradient_that_was_changed_after_the_check_is_told():
    def plant(number, optimizer):
        if number == 3:
            optimizer.register_step_pre_hook(spoil)

    def spoil(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(NAN)

    report, _ = run(sgd(), plant)
    assert (report.step, report.verdict) == (3, "update_nonfinite")
    assert "clipping, a hook or the optimizer itself has changed it in between" in report.happened
