"""Preflight of a model in memory: loaded, loaded in part, and not loaded are told by what the model holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import hallo_numguard as ng
from hallo_numguard.cli import main
from hallo_numguard.core.findings import PreflightReport

Tensors = dict[str, torch.Tensor]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))


def grave(report: PreflightReport) -> list[str]:
    return [finding.kind for finding in report.findings if finding.severity != "info"]


def prefixed(prefix: str) -> Callable[[Tensors], object]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


SAVED: dict[str, Callable[[Tensors], object]] = {
    "as it is": dict,
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled under DDP": prefixed("module._orig_mod."),
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "of Lightning": lambda state: {"state_dict": prefixed("net.")(state), "epoch": 3, "global_step": 7},
    "in a container": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "beside its average": lambda state: {
        "ema": {name: tensor + 0.01 for name, tensor in state.items()},
        "model": state,
    },
}


@pytest.mark.parametrize("name", SAVED)
def test_weights_that_were_loaded_are_right_whatever_their_names(tmp_path: Path, name: str) -> None:
    held = model()
    torch.save(SAVED[name](held.state_dict()), tmp_path / "a.pt")
    assert grave(ng.preflight(held, model=tmp_path / "a.pt")) == []
    assert grave(ng.preflight(model(1), model=tmp_path / "a.pt")) != []


def test_the_model_may_be_wrapped(tmp_path: Path) -> None:
    held = model()
    save_file(held.state_dict(), tmp_path / "a.safetensors")
    assert grave(ng.preflight(torch.compile(held), model=tmp_path / "a.safetensors")) == []
    assert grave(ng.preflight(nn.ModuleDict({"module": held}), model=tmp_path / "a.safetensors")) == []


def test_weights_that_were_loaded_in_part(tmp_path: Path) -> None:
    held, saved = model(), model(1)
    torch.save({"state_dict": prefixed("module.")(saved.state_dict())}, tmp_path / "a.pt")
    held[0].load_state_dict(saved[0].state_dict())
    held[2].load_state_dict(saved[2].state_dict())
    (finding,) = ng.preflight(held, model=tmp_path / "a.pt").findings
    assert finding.message.startswith("it was loaded in part: 2 of 6 tensors")
    assert "4.weight, 4.bias" in finding.message
    (finding,) = ng.preflight(model(2), model=tmp_path / "a.pt").findings
    assert finding.kind == "prefix"
    save_file(saved.state_dict(), tmp_path / "b.safetensors")
    (finding,) = ng.preflight(model(2), model=tmp_path / "b.safetensors").findings
    assert finding.message.startswith("nothing of it was loaded: 6 of 6 tensors")


@pytest.mark.parametrize("is_prefixed", [True, False])
def test_several_files_are_one_model(tmp_path: Path, is_prefixed: bool) -> None:
    held = nn.ModuleDict({"enc": model(), "dec": model(1)})
    for name, part in held.items():
        state = part.state_dict()
        save_file(prefixed(f"{name}.")(state) if is_prefixed else dict(state), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "enc.safetensors", tmp_path / "dec.safetensors"]
    assert grave(ng.preflight(held, model=paths)) == []
    assert set(grave(ng.preflight(held, model=paths[:1]))) == {"missing_key"}


class Adapted(nn.Module):
    """A linear layer with an adapter, under the names that peft gives."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})


def test_an_adapter_s_file_has_the_adapter_only(tmp_path: Path) -> None:
    held = nn.ModuleDict({"base_model": nn.ModuleDict({"model": nn.ModuleDict({"q": Adapted()})})})
    state = held.state_dict()
    adapter = {name.replace(".default", ""): tensor for name, tensor in state.items() if "lora" in name}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    assert grave(ng.preflight(held, model=tmp_path)) == []
    base = {name.split("model.")[-1].replace("base_layer.", ""): t for name, t in state.items() if "base_layer" in name}
    save_file(base, tmp_path / "base.safetensors")
    both = [tmp_path / "base.safetensors", tmp_path / "adapter_model.safetensors"]
    assert grave(ng.preflight(held, model=both)) == []
    held["base_model"]["model"]["q"].lora_B["default"].weight.data.add_(1.0)
    held["base_model"]["model"]["q"].lora_A["default"].weight.data.add_(1.0)
    assert grave(ng.preflight(held, model=tmp_path / "adapter_model.safetensors")) != []


def test_an_accelerator_without_deepspeed(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator, held = Accelerator(cpu=True), model()
    prepared, optimizer = accelerator.prepare(held, torch.optim.AdamW(held.parameters()))
    accelerator.backward(prepared(torch.rand(2, 8)).sum())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    assert grave(ng.preflight(accelerator, checkpoint=tmp_path / "state")) == []
    assert grave(ng.preflight(accelerator, model=tmp_path / "state" / "model.safetensors")) == []
    held[0].weight.data.add_(1.0)
    report = ng.preflight(accelerator, model=tmp_path / "state" / "model.safetensors")
    assert report.findings[0].name == "0.weight"


CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))

def with_batch():
    return model(), (torch.ones(2, 8),)

def loss(output):
    return output.square().mean()
"""


def test_the_command_takes_a_model_without_a_batch_and_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "more_user_code", raising=False)
    (tmp_path / "more_user_code.py").write_text(CODE)
    torch.save({"state_dict": model().state_dict()}, tmp_path / "a.pt")

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["preflight", "--model", "a.pt", *arguments], env={"COLUMNS": "300"})
        return done.exit_code, done.output

    assert run("--build", "more_user_code:model")[0] == 0
    code, text = run("--build", "more_user_code:with_batch")
    assert (code, "mean square of the output" in text) == (0, True)
    code, text = run("--build", "more_user_code:with_batch", "--loss", "more_user_code:loss")
    assert (code, "Smoke step: loss" in text) == (0, True)
    torch.save(prefixed("module.")(model().state_dict()), tmp_path / "a.pt")
    assert run("--build", "more_user_code:model")[0] == 1
    assert run("--build", "more_user_code:model", "--loss", "more_user_code:nothing")[0] == 2
