"""Hooks on a guarded model: they stay out of pickles, transforms and tracers, which do what they do without a guard."""

from __future__ import annotations

import copy
import subprocess

import pytest
import torch
from torch import nn
from torch.func import functional_call, functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import hallo_numguard as ng
from hallo_numguard.integrations.torch_optim.model_hooks import _ScriptPatch

import deepspeed_support
import fork_server
from frameworks import lightning_trainer


@pytest.fixture
def linear_of_torch(monkeypatch):
    """ZeRO stage 3 replaces the function for good, by one that no transform takes."""
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)


def small(guarded=True, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, ng.GuardedOptimizer(optimizer, model, ng.GuardConfig(**settings)) if guarded else optimizer


def step(model, optimizer, x=None):
    optimizer.zero_grad()
    model(torch.ones(3, 4) if x is None else x).square().sum().backward()
    optimizer.step()


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients_of_each_sample(model, x):
    def loss(parameters, sample):
        return functional_call(model, parameters, (sample,)).square().sum()

    return vmap(grad(loss), in_dims=(None, 0))(parameters(model), x)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) * 2


TRANSFORMS = {
    "functional_call": lambda model, x: functional_call(model, parameters(model), (x,)),
    "grad": lambda model, x: grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters(model)),
    "vmap": lambda model, x: vmap(model)(x),
    "vmap of grad": gradients_of_each_sample,
    "functionalize": lambda model, x: functionalize(lambda x: model(x))(x),
    "make_fx": lambda model, x: make_fx(lambda x: model(x))(x)(x),
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "symbolic_trace of a wrapper": lambda model, x: torch.fx.symbolic_trace(Wrapper(model))(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, x)(x),
    "jit.trace of a wrapper": lambda model, x: torch.jit.trace(Wrapper(model), x)(x),
    "jit.script": lambda model, x: torch.jit.script(model)(x),
    "jit.script of a wrapper": lambda model, x: torch.jit.script(Wrapper(model))(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
    "compile of a copy": lambda model, x: torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(x),
}


def flat(result):
    return list(result.values()) if isinstance(result, dict) else [result]


@pytest.mark.usefixtures("linear_of_torch")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("local_gradients", ["on_alarm", "always"])
def test_transforms_of_a_guarded_model_are_those_of_a_plain_one(name, local_gradients):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain, _ = small(guarded=False)
    expected = flat(TRANSFORMS[name](plain, x))
    model, optimizer = small(local_gradients=local_gradients)
    found = flat(TRANSFORMS[name](model, x))
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    step(model, optimizer, x)
    x[2, 1] = float("nan")  # the guard is still there
    step(model, optimizer, x)
    assert (optimizer.last_report.verdict, optimizer.last_report.first.index) == ("input_nonfinite", (2, 1))


def test_scripting_resolves_what_it_resolves_without_a_guard():
    _, optimizer = small()

    @torch.jit.script
    class Number:
        def __init__(self, x: int) -> None:
            self.x = x

    @torch.jit.script
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + Number(3).x

    assert add(torch.zeros(1)).item() == 3
    optimizer.detach()


def test_one_patch_of_scripting_serves_all_guards_and_goes_with_the_last():
    first, second = (small()[1]._guard._calls for _ in range(2))
    patch, before = _ScriptPatch(), torch.jit.script
    patch.add(first)
    patched = torch.jit.script
    assert patched is not before
    patch.add(second)
    assert torch.jit.script is patched
    patch.discard(first)
    assert torch.jit.script is patched
    patch.discard(second)
    assert torch.jit.script is before


LOAD = """
import sys
sys.modules["hallo_numguard"] = None  # as where it is not installed
import torch
model = torch.load(sys.argv[1], weights_only=False)
x = torch.ones(3, 4)
model(x).sum().backward()
assert model(x).shape == (3, 1)
assert torch.compile(model, backend="eager")(x).shape == (3, 1)
torch.save(model, sys.argv[1])
print("done", float(model[0].weight.detach().sum()))
"""


@pytest.mark.parametrize("local_gradients", ["on_alarm", "always"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.filterwarnings("error")
def test_a_pickle_of_a_guarded_model_loads_where_we_are_not_installed(local_gradients, steps, tmp_path):
    model, optimizer = small(local_gradients=local_gradients)
    for _ in range(steps):
        step(model, optimizer)
    torch.save(model, tmp_path / "model.pt")
    assert b"numguard" not in (tmp_path / "model.pt").read_bytes()
    command = [*fork_server.command(), "-c", LOAD, str(tmp_path / "model.pt")]
    loading = subprocess.run(command, capture_output=True, text=True, check=False)
    assert loading.stdout == f"done {float(model[0].weight.detach().sum())}\n", loading.stderr
    step(model, optimizer)
    assert len(optimizer.history) == steps + 1, "the model itself is still guarded"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_of_an_engine_refers_to_nothing_of_ours(stage, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    engine = deepspeed_support.make_engine("fp16", stage=stage)
    guard = ng.attach(engine, ng.GuardConfig(local_gradients="always"))
    deepspeed_support.train_step(engine, 0)
    engine.save_checkpoint(str(tmp_path), tag="t")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path.name for path in files if b"hallo_numguard" in path.read_bytes()]
    guard.detach()


try:
    from lightning.pytorch import LightningModule
except ImportError:
    LightningModule = nn.Module


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)


def test_a_pickle_of_a_module_of_lightning_refers_to_nothing_of_ours(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    saved = tmp_path / "model.pt"

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.trainer, before = None, module.trainer  # which cannot be pickled
            torch.save(module, saved)
            module.trainer = before

    trainer = lightning_trainer(pl, [ng.integrations.LightningNumGuardCallback(), Saves()], max_steps=2)
    trainer.fit(Regression())
    assert b"hallo_numguard" not in saved.read_bytes()
    assert torch.load(saved, weights_only=False).training_step((torch.ones(2, 4),), 0).isfinite()


@pytest.mark.filterwarnings("error")
def test_a_trained_tensor_that_is_no_parameter_is_saved_without_a_warning(tmp_path):
    weight = torch.ones(4, 1, requires_grad=True)
    optimizer = ng.GuardedOptimizer(
        torch.optim.SGD([weight], lr=0.1), [("weight", weight)], ng.GuardConfig(local_gradients="always")
    )
    (torch.ones(3, 4) @ weight).sum().backward()
    optimizer.step()
    torch.save(weight, tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt"), weight)
    assert torch.equal(copy.deepcopy(weight), weight)
