"""GuardedOptimizer: planted faults and the right verdict, clean runs of the same bits, and torch's own contract."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import hallo_numguard as ng

import adapter_support as support
from campaign.cases import CLEAN_STEPS, FAULTY_STEP, STEPS
from campaign.models import MODELS, Trap


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step=0):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def train_step(model, optimizer, step=0, scaler=None, unscale=False):
    optimizer.zero_grad()
    loss = model(batch(step)).square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
        return
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "adamw-single": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adam-fused-amsgrad": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# -- clean runs -------------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("scaling", ["none", "scaler", "unscaled"])
def test_a_clean_run_is_the_same_bits(make, scaling):
    runs = []
    for guarded in (False, True):
        model = small()
        optimizer = make(model.parameters())
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model)
        scaler = None if scaling == "none" else torch.amp.GradScaler("cpu", init_scale=3.0 * 2**10, growth_interval=2)
        for step in range(5):
            train_step(model, optimizer, step, scaler, unscale=scaling == "unscaled")
        runs.append((weights(model), None if scaler is None else scaler.state_dict()))
        state = optimizer.state_dict()
        runs[-1] += ([value for item in state["state"].values() for value in item.values()],)
    plain, guarded = runs
    assert same(plain[0], guarded[0])
    assert plain[1] == guarded[1]
    assert all(torch.equal(one, other) for one, other in zip(plain[2], guarded[2], strict=True) if torch.is_tensor(one))
    assert optimizer.last_report is None
    assert [record.applied for record in optimizer.history] == [True] * 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_clipping_is_torchs_to_rounding(fused, scaled, max_norm):
    results = []
    for guarded in (False, True):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model, clip_norm=max_norm)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(model(batch(step)).square().mean()).backward()
            if not guarded:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
        gradients = [parameter.grad for parameter in model.parameters()]
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*results, strict=True))
    left = torch.nn.utils.get_total_norm(gradients)
    assert left <= max_norm * (1 + 1e-5)
    assert optimizer.history[-1].norm / optimizer.history[-1].loss_scale >= left * (1 - 1e-6)  # before clipping


def test_gradients_below_the_limit_are_left_as_they_are():
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=1e6)
    model(batch()).square().mean().backward()
    versions = [parameter.grad._version for parameter in model.parameters()]
    optimizer.step()
    assert [parameter.grad._version for parameter in model.parameters()] == versions


# -- faults -----------------------------------------------------------------------------------------------------------


class Run:
    """A model of the campaign with a fault, trained a step at a time."""

    def __init__(self, faulty, setup, fused=False, scale=2.0**8):
        self.faulty, self.setup = faulty, setup
        if setup == "bf16":
            faulty.model.to(torch.bfloat16)
        faulty.fused = fused
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=setup.startswith("fp16"))
        self.optimizer = ng.GuardedOptimizer(
            faulty.optimizer(), faulty.model, faulty.config, on_overflow=faulty.reports.append
        )
        faulty.plant(self.optimizer)
        self.raised = False

    def steps(self, numbers):
        try:
            for number in numbers:
                self.step(number)
        except ng.NumericsError:
            self.raised = True
        return self

    def step(self, number):
        optimizer, scaler = self.optimizer, self.scaler
        arguments, target = self.faulty.batch(number)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=scaler.is_enabled()):
            output = self.faulty.model(*arguments)
        loss = self.faulty.model.loss(output, target)
        if self.faulty.fault == "loss" and number == FAULTY_STEP:
            loss = loss * float("inf")
        if not self.setup.endswith("unseen"):
            optimizer.watch_loss(loss)
        scaler.scale(loss).backward()
        if "unscaled" in self.setup:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def problems(self):
        return self.faulty.problems(self.optimizer, self.raised)


SETUPS = ("fp32", "bf16", "fp16", "fp16-unscaled", "fp32-unseen", "fp16-unseen")
FAULTS = (*support.FAULTS[1:], "loss")


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_fault_is_named(name, fault, setup):
    run = Run(support.Faulty(fault, name), setup)
    run.steps(range(1, STEPS + 1))
    assert run.problems() == []


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_clean_run_raises_nothing(name, setup, fused):
    run = Run(support.Faulty("none", name), setup, fused).steps(range(1, CLEAN_STEPS + 1))
    assert run.problems() == []


@pytest.mark.parametrize("setup", ["fp16", "fp16-unscaled"])
def test_a_scale_that_is_too_high_settles_where_it_was_said_to(setup):
    run = Run(support.Faulty("none"), setup, scale=2.0**40)
    while not run.optimizer.history or not run.optimizer.history[-1].applied:
        run.step(1)
    reports, history = run.faulty.reports, run.optimizer.history
    assert {report.verdict for report in reports} == {ng.Verdict.SCALE_TOO_HIGH}
    assert reports[-1].settles_at == history[-1].loss_scale
    assert not run.optimizer.last_report.provisional
    assert [record.loss_scale for record in history] == [2.0 ** (40 - step) for step in range(len(history))]


# -- the contract of torch.optim.Optimizer ----------------------------------------------------------------------------


@pytest.fixture
def model():
    return small()


@pytest.fixture
def optimizer(model):
    return ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model)


def test_it_is_an_optimizer_and_shows_the_wrapped_ones_parts(model):
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    guarded = ng.GuardedOptimizer(plain, model)
    assert isinstance(guarded, torch.optim.Optimizer)
    assert guarded.param_groups is plain.param_groups
    assert guarded.state is plain.state
    assert guarded.defaults is plain.defaults
    guarded.param_groups[0]["lr"] = 0.5
    assert plain.param_groups[0]["lr"] == 0.5
    assert "AdamW" in repr(guarded)
    assert guarded.detach() is plain


@pytest.mark.parametrize("scaled", [False, True])
def test_state_dicts_load_both_ways(scaled):
    def trained(guard, state=None):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters())
        if guard:
            optimizer = ng.GuardedOptimizer(optimizer, model)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(copy.deepcopy(state[1]))
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        for step in range(3):
            train_step(model, optimizer, step, scaler)
        return copy.deepcopy(model.state_dict()), optimizer.state_dict()

    plain, guarded = trained(False), trained(True)
    assert plain[1].keys() == guarded[1].keys()
    results = [trained(guard, state) for guard in (False, True) for state in (plain, guarded)]
    assert all(same(results[0][0].values(), other[0].values()) for other in results[1:])


def test_bad_state_is_found_when_it_is_loaded(model, optimizer):
    train_step(model, optimizer)
    state = optimizer.state_dict()
    state["state"][2]["exp_avg"][0, 3] = float("nan")
    optimizer.load_state_dict(state)
    (finding,) = optimizer.findings
    assert (finding.offender.kind, finding.name, finding.offender.index) == ("optimizer_state", "2.weight", (0, 3))


def test_hooks_of_every_kind_are_called_once_and_not_for_a_skipped_step(model, optimizer):
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("global"))
    try:
        train_step(model, optimizer)
        assert called == ["pre", "post", "global"]
        called.clear()
        model(batch() * float("nan")).sum().backward()
        optimizer.step()
        assert called == []
    finally:
        everywhere.remove()
    state = optimizer.state_dict()
    assert state.pop("extra") == 1
    optimizer.load_state_dict(state)
    assert called == ["save", "load", "loaded"]


def test_hooks_of_the_wrapped_optimizer_stay(model):
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    called = []
    plain.register_step_pre_hook(lambda *_: called.append(1))
    train_step(model, ng.GuardedOptimizer(plain, model))
    assert called == [1]


def schedulers():
    from torch.optim import lr_scheduler as lr

    return {
        "lambda": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
        "multiplicative": lambda o: lr.MultiplicativeLR(o, lambda _: 0.9),
        "step": lambda o: lr.StepLR(o, 2),
        "multistep": lambda o: lr.MultiStepLR(o, [1, 3]),
        "constant": lambda o: lr.ConstantLR(o, total_iters=2),
        "linear": lambda o: lr.LinearLR(o, total_iters=4),
        "exponential": lambda o: lr.ExponentialLR(o, 0.9),
        "polynomial": lambda o: lr.PolynomialLR(o, 4),
        "cosine": lambda o: lr.CosineAnnealingLR(o, 4),
        "warm restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 2),
        "cyclic": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        "one cycle": lambda o: lr.OneCycleLR(o, 0.1, total_steps=10),
        "sequential": lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], [2]),
        "chained": lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)]),
        "plateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
        "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
    }


@pytest.mark.parametrize("name", schedulers())
@pytest.mark.parametrize("scaled", [False, True])
def test_every_scheduler_of_torch(name, scaled):
    runs = []
    for guarded in (False, True):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        with warnings.catch_warnings(record=True) as caught:
            scheduler = schedulers()[name](optimizer)
            rates = []
            for step in range(6):
                train_step(model, optimizer, step, scaler)
                scheduler.step(*[1.0] if name == "plateau" else [])
                rates.append(optimizer.param_groups[0]["lr"])
        runs.append((rates, [str(warning.message) for warning in caught], weights(model)))
    assert runs[0][:2] == runs[1][:2]
    assert same(runs[0][2], runs[1][2])


def test_a_scheduler_that_was_there_before(model):
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
    optimizer = ng.GuardedOptimizer(plain, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            train_step(model, optimizer, step)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_trains_and_guards_on(model, optimizer, how):
    train_step(model, optimizer)
    other = how(optimizer)
    assert isinstance(other, ng.GuardedOptimizer)
    plain = how(optimizer.detach())
    assert plain.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert all(
        same(plain.state_dict()["state"][at].values(), state.values())
        for at, state in other.state_dict()["state"].items()
    )
    (weight, *_) = other.param_groups[0]["params"]
    assert (weight is model[0].weight) == (how is copy.copy)
    weight.grad = torch.full_like(weight, float("nan"))
    other.step()
    assert other.last_report.offenders[0].name == "0.weight"


def test_a_copy_of_the_model_is_not_watched(model, optimizer):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batch() * float("nan"))
    train_step(model, optimizer)
    assert optimizer.history[-1].applied
    other(batch() * float("nan")).sum().backward()
    assert not any(parameter.grad.isnan().any() for parameter in model.parameters())


def test_parameter_group_errors_are_torchs(model, optimizer):
    for wrong in ({"params": model[0].weight}, {"params": {nn.Parameter(torch.ones(1))}}, [1]):
        with pytest.raises((ValueError, TypeError)) as plain:
            torch.optim.AdamW(model.parameters()).add_param_group(copy.copy(wrong))
        with pytest.raises(type(plain.value)) as guarded:
            optimizer.add_param_group(copy.copy(wrong))
        assert str(guarded.value) == str(plain.value)


def test_groups_that_are_added_are_guarded(model):
    first, last = model[0], model[2]
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(first.parameters(), lr=0.1), model)
    optimizer.add_param_group({"params": last.parameters()})
    train_step(model, optimizer)
    assert set(optimizer.history[-1].parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    stranger = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [stranger]})
    stranger.grad = torch.tensor([0.0, float("inf"), 0.0])
    optimizer.step()
    assert (optimizer.last_report.first.name, optimizer.last_report.first.index) == ("param_groups[2][0]", (1,))
    assert torch.equal(stranger, torch.ones(3))


def test_parameters_without_gradients(model):
    model[0].bias.requires_grad_(False)
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model, clip_norm=1.0)
    optimizer.step()  # without backward
    assert optimizer.history[-1].norm == 0.0
    train_step(model, optimizer)
    assert set(optimizer.history[-1].parameters) == {"0.weight", "2.weight", "2.bias"}
    assert optimizer.last_report is None


def test_zero_grad(model, optimizer):
    train_step(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_guarded_is_refused(model):
    plain = torch.optim.AdamW(model.parameters())
    for wrong in (model, ng.GuardedOptimizer(plain, model)):
        with pytest.raises(ng.InvalidInput, match="GuardedOptimizer takes a plain"):
            ng.GuardedOptimizer(wrong, model)
    with pytest.raises(ng.InvalidInput, match="trains no parameter of that model"):
        ng.GuardedOptimizer(plain, small(1))
    with pytest.raises(ng.InvalidInput, match="clip_norm"):
        ng.GuardedOptimizer(plain, model, clip_norm=0.0)


def test_names_alone_will_do(model):
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model.named_parameters())
    train_step(model, optimizer)
    with torch.no_grad():
        model[2].weight[0, 3] = float("nan")
    optimizer.zero_grad()
    optimizer.watch_loss(model(batch()).square().mean()).backward()
    with pytest.raises(ng.NumericsError) as caught:
        optimizer.step()
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("2.weight", (0, 3))


def test_several_optimizers_on_one_model(model):
    both = [ng.GuardedOptimizer(torch.optim.SGD(part.parameters(), lr=0.1), model) for part in (model[0], model[2])]
    for step in range(3):
        model(batch(step)).square().mean().backward()
        if step == 1:
            model[2].weight.grad[0, 3] = float("inf")
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert both[0].last_report is None
    assert both[1].last_report.offenders[0].name == "2.weight"
    assert [record.applied for record in both[1].history] == [True, False, True]


# -- closures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_the_same_bits(line_search):
    results = []
    for guarded in (False, True):
        model = small()
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn=line_search)
        optimizer = ng.GuardedOptimizer(optimizer, model) if guarded else optimizer

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(batch()).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).detach() for _ in range(3)]
        results.append([*losses, *weights(model)])
    assert same(*results)
    assert len(optimizer.history) == optimizer.state[model[0].weight]["func_evals"]
    assert optimizer.history[-1].loss is not None


@pytest.mark.parametrize("bad_evaluation", [1, 4])
def test_lbfgs_makes_no_step_of_which_an_evaluation_was_bad(model, bad_evaluation):
    optimizer = ng.GuardedOptimizer(torch.optim.LBFGS(model.parameters()), model)
    before, evaluations = weights(model), 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        if evaluations == bad_evaluation:
            model[2].weight.grad[0, 3] = float("nan")
        return loss

    optimizer.step(closure)
    assert evaluations == bad_evaluation
    assert same(before, weights(model))
    assert optimizer.last_report.offenders[0].name == "2.weight"
    assert [record.applied for record in optimizer.history] == [True] * (bad_evaluation - 1) + [False]
    assert optimizer.step(closure) < 0.1
    assert not same(before, weights(model))


def test_the_loss_of_a_closure_is_seen(model):
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=0.01)

    def closure():
        optimizer.zero_grad()
        loss = model(batch()).square().mean() * float("nan")
        loss.backward()
        return loss

    assert optimizer.step(closure).isnan()
    assert optimizer.last_report.first.kind == "loss"


def test_an_error_in_a_closure_is_the_scripts(model, optimizer):
    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    train_step(model, optimizer)
    assert [record.applied for record in optimizer.history] == [True]


# -- torch.amp.GradScaler ---------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Takes note of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_makes_no_pass_of_its_own(model, fused):
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=fused), model, clip_norm=1.0)
    scaler = torch.amp.GradScaler("cpu")
    train_step(model, optimizer, scaler=scaler)
    scaler.scale(model(batch()).square().mean()).backward()
    with Operators() as seen, warnings.catch_warnings(record=True) as caught:
        scaler.step(optimizer)
        scaler.update()
    assert "_amp_foreach_non_finite_check_and_unscale_" not in seen.called
    assert "_amp_update_scale_" in seen.called
    assert seen.called.count("_foreach_mul_") == (0 if fused else seen.called.count("_foreach_mul_"))
    assert [str(warning.message) for warning in caught] == []


def test_a_scaler_that_is_switched_off(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train_step(model, optimizer, scaler=scaler)
    assert optimizer.history[-1].loss_scale == 1.0
    assert optimizer.history[-1].applied


@pytest.mark.parametrize("unscale", [False, True])
def test_a_skip_of_the_scaler_becomes_a_report_and_lowers_the_scale(model, optimizer, unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train_step(model, optimizer, 0, scaler, unscale)
    before = weights(model)
    optimizer.zero_grad()
    scaler.scale(optimizer.watch_loss(model(batch()).square().mean())).backward()
    model[2].weight.grad[0, 3] = float("inf")
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert same(before, weights(model))
    assert optimizer.last_report.loss_scale == 64.0
    assert [(item.name, item.index) for item in optimizer.last_report.offenders] == [("2.weight", (0, 3))]
    fresh = small()
    fresh(batch()).square().mean().backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in fresh.parameters()])
    assert optimizer.history[0].norm == pytest.approx(64 * float(norm))  # scaled like the loss, whoever has unscaled


def test_no_halving_is_burnt_on_a_weight(model, optimizer):
    with torch.no_grad():
        model[2].weight[0, 3] = float("nan")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with pytest.raises(ng.NumericsError) as caught:
        train_step(model, optimizer, scaler=scaler)
    (line,) = [line for line in caught.value.report.evidence if "cannot help" in line]
    assert "GradScaler would skip 6 steps on the way from 64 down to 1, and then go on to skip every one" in line


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**-140, 0.0])
def test_a_scale_that_has_collapsed_is_not_to_blame(scale):
    model = nn.Sequential(nn.Linear(4, 8), Trap(), nn.Linear(8, 1))
    model[1].armed = True
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(optimizer.watch_loss(model(batch()).square().mean())).backward()
    scaler.step(optimizer)
    assert optimizer.last_report.verdict == "backward_nonfinite"
    assert optimizer.last_report.first.name == "1"
    assert optimizer.history[-1].loss_scale > 0


def test_the_scale_is_kept_for_what_it_is_not_to_blame_for(model):
    config = ng.GuardConfig(policy=ng.Policy(keep_scale=True))
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for poison, scale in ((float("nan"), 64.0), (1.0, 64.0)):
        optimizer.zero_grad()
        scaler.scale(optimizer.watch_loss(model(batch() * poison).square().mean())).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert [record.applied for record in optimizer.history] == [False, True]


def test_a_step_that_was_replaced_needs_its_scaler_set(model, optimizer):
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: step(*args, **kwargs)  # as Accelerate does
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with pytest.raises(ng.InvalidInput, match="set its attribute scaler"):
        train_step(model, optimizer, scaler=scaler)
    optimizer.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for unscale in (False, True):
        train_step(model, optimizer, 0, scaler, unscale)
    model(batch() * float("inf"))
    optimizer.zero_grad()
    scaler.scale(model(batch() * float("nan")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [record.loss_scale for record in optimizer.history] == [64.0] * 3
    assert [record.applied for record in optimizer.history] == [True, True, False]
    assert scaler.get_scale() == 32.0


def test_a_detached_one_leaves_all_to_the_scaler():
    results = []
    for guarded in (False, True):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model)
            optimizer.detach()
        scaler = torch.amp.GradScaler("cpu")
        for step in range(3):
            train_step(model, optimizer, step, scaler)
        results.append(weights(model))
    assert same(*results)
    assert optimizer.history == []


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["model", "in place", "wrapped step", "whole step"])
def test_what_is_compiled_is_guarded(where):
    torch._dynamo.reset()
    results = []
    for guarded in (False, True):
        model = small()
        called, optimizer = model, torch.optim.AdamW(model.parameters())
        if where == "model":
            called = torch.compile(model, backend="aot_eager")
        if where == "wrapped step":
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, called)
        if where == "in place":
            model.compile(backend="aot_eager")
        step = optimizer.step
        if where == "whole step":
            step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for number in range(3):
            optimizer.zero_grad()
            called(batch(number)).square().mean().backward()
            step()
        results.append(weights(model))
    assert all(torch.allclose(one, other) for one, other in zip(*results, strict=True))
    assert [record.applied for record in optimizer.history] == [True] * 3
    before = weights(model)
    optimizer.zero_grad()
    (called(batch() * float("nan"))).square().mean().backward()
    step()
    assert same(before, weights(model))
    report = optimizer.last_report
    assert len(report.offenders) == 4
    assert report.verdict == "input_nonfinite"
    assert report.first.name == "input"


# -- fused optimizers on a device that works behind the host's back ---------------------------------------------------


@pytest.fixture
def sync_is_costly(monkeypatch):
    """The way that a GPU makes a fused step, on the CPU, whose kernels heed the same tensors."""
    monkeypatch.setattr("hallo_numguard.integrations.torch_optim.guarded_optimizer.sync_is_costly", lambda _: True)


@pytest.mark.parametrize("max_norm", [None, 0.05, 100.0])
def test_steps_without_a_host_sync_are_torchs(sync_is_costly, max_norm):
    results = []
    for guarded in (False, True):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model, clip_norm=max_norm)
        for step in range(5):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            if max_norm is not None and not guarded:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        results.append(weights(model))
    if max_norm == 0.05:
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*results, strict=True))
    else:
        assert same(*results)
    optimizer.detach()
    assert [record.applied for record in optimizer.history] == [True] * 5


@pytest.mark.parametrize("fault", sorted({*FAULTS} - {"forward", "backward"}))
@pytest.mark.parametrize("name", MODELS)
def test_a_bad_step_without_a_host_sync_is_named_a_step_later(sync_is_costly, name, fault):
    run = Run(support.Faulty(fault, name), "fp32", fused=True)
    bad = {"buffer": 1, "optimizer_state": FAULTY_STEP + 1}.get(fault, FAULTY_STEP)
    run.steps(range(1, bad))
    before = weights(run.faulty.model)
    run.step(bad)
    if all(bool(tensor.isfinite().all()) for tensor in run.faulty.model.parameters()):
        assert same(before, weights(run.faulty.model))
    assert run.faulty.reports == []
    run.steps([bad + 1])
    (report,) = run.faulty.reports
    assert report.step == bad
    run.steps([] if run.raised else range(bad + 2, STEPS + 1))
    run.optimizer.detach()
    assert run.problems() == []


def test_a_batch_is_run_again_a_step_later(sync_is_costly):
    model = nn.Sequential(nn.Linear(4, 8), Trap(), nn.Linear(8, 1))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), model)
    verdicts = {}
    for step in range(1, 6):
        model[1].armed = step >= 4
        optimizer.zero_grad()
        scale = 1e38 if step == 2 else 1.0  # its square is not finite
        optimizer.watch_loss(model(batch(step) * scale).square().mean()).backward()
        optimizer.step()
        if optimizer.last_report is not None:
            report = optimizer.last_report
            verdicts[report.step] = (report.verdict, report.first.name)
    assert verdicts == {2: ("undetermined", "loss"), 4: ("backward_nonfinite", "1")}
    optimizer.detach()
    assert [record.applied for record in optimizer.history] == [True, False, True, False, False]


def test_the_last_step_is_reported_when_the_guard_is_taken_off(sync_is_costly, model):
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=True), model)
    model(batch() * float("nan")).sum().backward()
    optimizer.step()
    assert optimizer.last_report is None
    optimizer.detach()
    assert optimizer.last_report.verdict == "input_nonfinite"


# -- what is kept, and failures of our own ----------------------------------------------------------------------------


def test_reports_go_to_files_trackers_and_bundles(model, tmp_path):
    class Sink:
        steps, reports = [], []

        def write(self, step, figures):
            self.steps.append((step, figures["applied"]))

        def report(self, report):
            self.reports.append(report.verdict)

    folders = {"dump_dir": tmp_path / "dump", "repro_dir": tmp_path / "repro"}
    optimizer = ng.GuardedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, ng.GuardConfig(sinks=[Sink()], **folders)
    )
    train_step(model, optimizer)
    ng.inject(optimizer, "activation", "1", value=float("inf"))
    train_step(model, optimizer)
    assert Sink.steps == [(1, 1), (2, 0)]
    assert Sink.reports == ["forward_nonfinite"]
    (dumped,) = (tmp_path / "dump").iterdir()
    assert ng.OverflowReport.from_json(dumped.read_text()) == optimizer.last_report
    (bundle,) = (tmp_path / "repro").iterdir()
    assert (bundle / "reproduce.py").exists()


def test_policy_and_callback_decide(model):
    reports = []

    def decide(report):
        reports.append(report)
        return "raise" if len(reports) == 2 else "warn"

    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, on_overflow=decide)
    model(batch() * float("nan")).sum().backward()
    assert optimizer.step() is None
    with pytest.raises(ng.NumericsError):
        optimizer.step()
    optimizer.zero_grad()
    train_step(model, optimizer)
    assert [record.applied for record in optimizer.history] == [False, False, True]


@pytest.mark.contains_failures
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_in_which_the_guard_fails_is_checked_by_torch(model, optimizer, monkeypatch, scaled, bad, caplog):
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    train_step(model, optimizer, 0, scaler)

    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(optimizer._guard._gradients, "read", fail)
    before = weights(model)
    optimizer.zero_grad()
    scaler.scale(model(batch() * (float("nan") if bad else 1.0)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(before, weights(model)) == bad  # the step it failed in is checked by torch alone
    assert "this step is checked without it" in caplog.text
    if bad:
        assert optimizer.last_report.verdict is ng.Verdict.UNDETERMINED
        assert "the guard has failed on this rank or another" in str(optimizer.last_report).replace(
            "\n              ", " "
        )
    monkeypatch.undo()
    train_step(model, optimizer, 2, scaler)
    assert not same(before, weights(model))
    assert len(optimizer.history) == 2


def test_a_forward_pass_that_no_step_follows_is_not_held(model, optimizer):
    with torch.no_grad():
        model(batch())
    assert not optimizer._guard.session._batch.calls
    optimizer.detach()
    model(batch())
    assert not optimizer._guard.session._batch.calls


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "scaled", "fused on a GPU"])
@pytest.mark.parametrize(("kind", "where", "lost"), [("parameter", "2.weight", 7), ("optimizer_state", "0.bias", 8)])
def test_a_damaged_run_goes_back_and_trains_on(tmp_path, monkeypatch, way, kind, where, lost):
    late = way == "fused on a GPU"
    monkeypatch.setattr("hallo_numguard.integrations.torch_optim.guarded_optimizer.sync_is_costly", lambda _: late)
    model = small()
    keeper = ng.CheckpointKeeper(tmp_path, healthy_after=2)
    config = ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback"))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), fused=late), model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=way == "scaled")
    ng.inject(optimizer, kind, where, step=7)
    saved = None
    for step in range(1, 13):
        optimizer.zero_grad()
        scaler.scale(optimizer.watch_loss(model(batch(step)).square().mean())).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            keeper.save({"optimizer": optimizer, "model": model})
            saved = weights(model)
        if step == lost + late:
            assert same(saved, weights(model))
    assert optimizer.last_report.verdict in ("weights_nonfinite", "optimizer_state_nonfinite")
    assert optimizer.findings == []
    assert scaler.get_scale() == (64.0 if way == "scaled" else 1.0)
    optimizer.detach()
    steps = [step for step in range(1, 13) if not (late and step == lost + 1)]  # of no use after it went back
    assert [record.applied for record in optimizer.history] == [step != lost for step in steps]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_without_a_checkpoint_it_raises(tmp_path, model):
    config = ng.GuardConfig(keeper=ng.CheckpointKeeper(tmp_path), policy=ng.Policy(on_unrecoverable="rollback"))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model, config)
    with torch.no_grad():
        model[2].weight[0, 3] = float("nan")
    with pytest.raises(ng.NumericsError):
        train_step(model, optimizer)
