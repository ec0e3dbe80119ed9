"""HALLO_NUMGUARD_DISABLE=1: the script runs as it is, and nothing of the guard is in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.core import environment

import adapter_support as support
import deepspeed_support
from frameworks import hugging_face_trainer, lightning_module, lightning_trainer


@pytest.fixture(autouse=True)
def disabled(monkeypatch):
    monkeypatch.setenv(environment.DISABLE_VARIABLE, "1")
    environment._log_disabled.cache_clear()
    yield
    environment._log_disabled.cache_clear()


def is_empty(guard):
    return (guard.last_report, guard.history, guard.findings) == (None, [], [])


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = [hook for part in model.modules() for kind in kinds for hook in getattr(part, kind).values()]
    return hooks + [hook for parameter in model.parameters() for hook in (parameter._backward_hooks or {}).values()]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model, optimizer, clip=None, scaler=None, bad=False):
    for number in range(3):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        loss = model(x * (float("nan") if bad else 1.0)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return support.weights(model)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_guarded_optimizer_passes_calls_on_and_still_clips(clip, scaled, caplog):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=16.0) if scaled else None

    plain = small()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), clip, scaler())
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=clip)
    assert isinstance(optimizer, ng.GuardedOptimizer)
    assert hooks_of(model) == []
    support.assert_same_bits(train(model, optimizer, None, scaler()), expected)
    assert is_empty(optimizer)
    ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert [record.getMessage() for record in caplog.records if record.name == "hallo_numguard"] == [
        "hallo_numguard is off, because HALLO_NUMGUARD_DISABLE is set: no run of this process is guarded"
    ]


def test_a_closure_is_clipped_and_a_bad_step_is_applied():
    def run(make):
        model = small()
        optimizer = make(model)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if not isinstance(optimizer, ng.GuardedOptimizer):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        assert optimizer.step(closure).item() > 0
        return support.weights(model)

    support.assert_same_bits(
        run(lambda model: ng.GuardedOptimizer(torch.optim.LBFGS(model.parameters()), model, clip_norm=0.1)),
        run(lambda model: torch.optim.LBFGS(model.parameters())),
    )
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert torch.isnan(train(model, optimizer, bad=True)["0.weight"]).any(), "as it is without a guard"
    assert is_empty(optimizer)


def test_copies_and_state_are_the_wrapped_optimizers(monkeypatch):
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    train(model, optimizer)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    assert type(copy.deepcopy(optimizer)) is type(optimizer)
    saved = pickle.dumps(optimizer)
    monkeypatch.delenv(environment.DISABLE_VARIABLE)
    assert pickle.loads(saved)._guard.active, "a process in which guards are not disabled"
    assert type(optimizer.detach()) is torch.optim.AdamW


@pytest.mark.parametrize("value", ["", "0", "False"])
def test_other_values_leave_the_guard_on(value, monkeypatch):
    monkeypatch.setenv(environment.DISABLE_VARIABLE, value)
    model = small()
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    train(model, optimizer)
    assert len(optimizer.history) == 3


@pytest.mark.usefixtures("cpu_alone")
def test_an_accelerator():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(small(), torch.optim.AdamW(small().parameters()))
    before = {owner: dict(vars(owner)) for owner in (accelerator, optimizer)}
    guard = ng.attach(accelerator)
    assert {owner: dict(vars(owner)) for owner in (accelerator, optimizer)} == before
    assert is_empty(guard)
    assert hooks_of(model) == []
    guard.detach()


@pytest.mark.usefixtures("cpu_alone")
@pytest.mark.parametrize("how", ["attach", "callback"])
def test_a_trainer_of_hugging_face_trains_into_nan_and_saves_it(how, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    trainer = hugging_face_trainer(support.Faulty("weight", kind=support.WithLoss), tmp_path)
    if how == "attach":
        guard = ng.attach(trainer)
    else:
        guard = ng.integrations.NumGuardCallback()
        trainer.add_callback(guard)
    attributes = set(vars(trainer))
    trainer.train()
    trainer.save_model()
    assert is_empty(guard)
    assert guard.stopped_by is None
    assert not {name for name in set(vars(trainer)) - attributes if callable(getattr(trainer, name))}
    assert not [name for row in trainer.state.log_history for name in row if name.startswith("numguard")]
    assert not (tmp_path / "numguard").exists()
    guard.detach()


@pytest.mark.parametrize("how", ["attach", "callback"])
def test_a_trainer_of_lightning(how, tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    faulty = support.Faulty("weight")
    callbacks = [] if how == "attach" else [ng.integrations.LightningNumGuardCallback()]
    trainer = lightning_trainer(pl, callbacks, max_steps=faulty.steps)
    guard = ng.attach(trainer) if how == "attach" else callbacks[0]
    module = lightning_module(pl)(faulty)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert is_empty(guard)
    assert hooks_of(faulty.model) == []
    assert "save_checkpoint" not in vars(trainer)
    guard.detach()


def test_an_engine_of_deepspeed():
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    engine = deepspeed_support.make_engine("half")
    before = set(vars(engine)), set(vars(engine.optimizer))
    guard = ng.attach(engine)
    assert (set(vars(engine)), set(vars(engine.optimizer))) == before
    assert is_empty(guard)


def test_a_keeper_saves_all_the_same(tmp_path):
    model = small()
    keeper = ng.CheckpointKeeper(tmp_path)
    config = ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback"))
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, config)
    train(model, optimizer, bad=True)
    assert keeper.save({"model": model, "optimizer": optimizer}, step=1).path.exists()
