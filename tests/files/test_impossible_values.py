"""Values that no model or optimizer holds, though they are finite, and intact values like them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hallo_numguard as ng

Tensors = dict[str, torch.Tensor]
LAYERS = range(6)


def grave(path: Path) -> list[str]:
    """Returns the kinds of warnings and errors in a scan."""
    return sorted(finding.kind for finding in ng.scan(path).findings if finding.severity != "info")


def base() -> Tensors:
    """Weights of a small model."""
    torch.manual_seed(0)
    made = {"embed.weight": torch.randn(40, 32), "norm.weight": torch.ones(32), "lm_head.weight": torch.randn(40, 32)}
    for layer in LAYERS:
        made |= {
            f"layers.{layer}.attn.q_proj.weight": torch.randn(32, 32) * 0.1,
            f"layers.{layer}.attn.o_proj.weight": torch.randn(32, 32) * 0.1,
            f"layers.{layer}.gate": torch.zeros(1),
        }
    return made


def memory(size: int) -> torch.Tensor:
    """What memory held: text, read as floats."""
    return torch.frombuffer(bytearray(b"the quick brown fox jumps over it " * size)[: 4 * size], dtype=torch.float32)


def with_all(pattern: str, value: float) -> Tensors:
    return {name: torch.full_like(tensor, value) for name, tensor in base().items() if pattern in name}


FAULTS: dict[str, tuple[Callable[[], Tensors], list[str]]] = {
    "intact": (dict, []),
    "placeholders": (lambda: {name: torch.empty(0) for name in base()}, ["no_values"]),
    "placeholders of one layer": (lambda: {"layers.3.attn.q_proj.weight": torch.empty(0)}, ["no_values"]),
    "a buffer of no elements": (lambda: {"cache.positions": torch.empty(0)}, []),
    "zeros in one layer": (lambda: {"layers.2.attn.o_proj.weight": torch.zeros(32, 32)}, ["all_zero"]),
    "a role that is zero everywhere": (lambda: with_all("q_proj", 0.0), ["all_zero"]),
    "projections that begin with zeros": (lambda: with_all("o_proj", 0.0), []),
    "a zero embedding": (lambda: {"embed.weight": torch.zeros(40, 32)}, ["all_zero"]),
    "a mask token of zeros": (lambda: {"embeddings.mask_token": torch.zeros(1, 1, 32)}, []),
    "positions of zeros": (lambda: {"embeddings.position_embeddings": torch.zeros(1, 10, 32)}, []),
    "memory as weights": (lambda: {"score.weight": memory(8 * 32).view(8, 32).clone()}, ["absurd_values"]),
    "integers read as floats": (
        lambda: {"head.weight": torch.randint(1, 2000, (40, 32), dtype=torch.int32).view(torch.float32)},
        ["absurd_values"],
    ),
    "integers read as half floats": (
        lambda: {"score.weight": torch.randint(1, 200, (80, 64), dtype=torch.int16).view(torch.float16)},
        ["absurd_values"],
    ),
    "half floats that began with zeros": (lambda: {"final_head.weight": torch.full((80, 64), 1e-5).half()}, []),
    "a large mask": (lambda: {"attn.masked_bias": torch.full((4, 4), -1e30)}, []),
    "one constant layer": (lambda: {"layers.4.attn.q_proj.weight": torch.full((32, 32), 0.5)}, ["constant"]),
    "bounds and trackers": (
        lambda: {
            "best": torch.tensor(float("inf")),
            "floor": torch.full((8,), float("-inf")),
            "o.max_val": -torch.ones(3) / 0,
        },
        [],
    ),
    "an additive mask": (lambda: {"attn.bias": torch.full((4, 4), float("-inf")).triu(1)}, ["nonfinite"]),
    "an additive mask of another name": (lambda: {"attn.allowed": torch.full((4, 4), float("-inf")).triu(1)}, []),
    "infinite statistics": (lambda: {"bn.running_var": torch.full((4,), float("inf"))}, ["nonfinite"]),
    "an infinite scale": (lambda: {"logit_scale": torch.tensor(float("inf"))}, ["nonfinite"]),
    "half of the layers in another type": (
        lambda: {name: tensor.half() for name, tensor in base().items() if "layers.0." in name or "layers.5." in name},
        [],
    ),
    "one weight in another type": (
        lambda: {"layers.3.attn.q_proj.weight": torch.randn(32, 32).half() * 0.1},
        ["dtype"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_weights_that_are_none(tmp_path: Path, name: str) -> None:
    change, kinds = FAULTS[name]
    save_file({**base(), **change()}, tmp_path / "model.safetensors")
    assert grave(tmp_path) == kinds


def test_of_two_copies_the_sound_one_is_named(tmp_path: Path) -> None:
    live, average = base(), base()
    live["layers.1.attn.q_proj.weight"][0, 0] = float("nan")
    torch.save({"model": live, "ema": average}, tmp_path / "a.pt")
    (finding,) = [one for one in ng.scan(tmp_path).findings if one.severity == "error"]
    assert "The copy ema.layers.1.attn.q_proj.weight in the same folder is sound." in finding.remedy


def test_an_adapter_that_adds_nothing(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.q_proj.lora_A.weight": torch.randn(4, 16) for n in LAYERS}
    tensors |= {f"layers.{n}.q_proj.lora_B.weight": torch.zeros(16, 4) for n in LAYERS}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert [(one.kind, one.severity) for one in ng.scan(tmp_path).findings] == [("zero_adapter", "info")]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2000}))
    assert [(one.kind, one.severity) for one in ng.scan(tmp_path).findings] == [("zero_adapter", "error")]
    trained = {name: torch.randn(16, 4) for name in tensors if "lora_B" in name}
    save_file({**tensors, **trained}, tmp_path / "adapter_model.safetensors")
    assert grave(tmp_path) == []
    idle = {name.replace("q_proj", "v_proj"): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **trained, **idle}, tmp_path / "adapter_model.safetensors")
    assert grave(tmp_path) == ["zero_adapter"]


@pytest.mark.parametrize("change", [None, "negative", "never moved"])
def test_running_statistics(tmp_path: Path, change: str | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    torch.save(net.state_dict(), tmp_path / "new.pt")
    net(torch.randn(2, 3, 8, 8))
    state = net.state_dict()
    if change == "negative":
        state["1.running_var"][2] = -1e-5
    elif change:
        state["1.running_var"].fill_(1.0)
        state["1.running_mean"].fill_(0.0)
    torch.save(state, tmp_path / "trained.pt")
    assert grave(tmp_path / "new.pt") == []
    assert grave(tmp_path / "trained.pt") == (["running_statistics"] if change else [])


def quantized() -> Tensors:
    """fp8 weights scaled by blocks of 128, beside others that are not quantized."""
    torch.manual_seed(0)
    made: Tensors = {"embed.weight": torch.randn(64, 256).bfloat16()}
    for layer in LAYERS:
        weight = torch.randn(128, 256)
        scale = weight.view(1, 128, 2, 128).abs().amax((1, 3)) / 448
        scaled = weight / scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        made[f"layers.{layer}.up.weight"] = scaled.to(torch.float8_e4m3fn)
        made[f"layers.{layer}.up.weight_scale_inv"] = scale
    return made


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def first_scale(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors["layers.1.up.weight_scale_inv"].view(-1)[:1].fill_(value)


def saturate(tensors: Tensors) -> None:
    weight = tensors["layers.1.up.weight"].float()
    tensors["layers.1.up.weight"] = (weight * 50).clamp(-448, 448).to(torch.float8_e4m3fn)


def keep_first(tensors: Tensors) -> None:
    tensors["layers.0.up.weight"] = tensors.pop("layers.0.up.weight").bfloat16()
    del tensors["layers.0.up.weight_scale_inv"]


def as_powers(tensors: Tensors) -> None:
    for name in [name for name in tensors if "scale" in name]:
        tensors[name] = tensors[name].log2().ceil().exp2().to(torch.float8_e8m0fnu)


def plain_cast(tensors: Tensors) -> None:
    drop("scale")(tensors)
    for name in [name for name in tensors if name.startswith("layers")]:
        tensors[name] = torch.randn(128, 256).to(torch.float8_e4m3fn)


SCALES: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "intact": (lambda tensors: None, []),
    "one scale missing": (drop("layers.3.up.weight_scale_inv"), ["missing_scale"]),
    "all scales missing": (drop("scale"), ["missing_scale"]),
    "never scaled": (plain_cast, []),
    "a scale of zero": (first_scale(0.0), ["bad_scale"]),
    "a negative scale": (first_scale(-1.0), ["bad_scale"]),
    "a scale that is NaN": (first_scale(float("nan")), ["nonfinite"]),
    "saturated": (saturate, ["fp8_range"]),
    "the first layer kept in bfloat16": (keep_first, []),
    "scales that are powers of two": (as_powers, []),
    "another log of a scale": (lambda tensors: tensors.update({"flow.log_scale": torch.zeros(4)}), []),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_quantized_weights(tmp_path: Path, name: str) -> None:
    change, kinds = SCALES[name]
    tensors = quantized()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert grave(tmp_path) == kinds


def test_packed_integers_with_a_hole_of_pages(tmp_path: Path) -> None:
    packed = torch.randint(-(2**31), 2**31 - 1, (256, 256), dtype=torch.int32)
    save_file({"layers.0.qweight": packed}, tmp_path / "a.safetensors")
    assert grave(tmp_path) == []
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[8 * 4096 : 16 * 4096] = bytes(8 * 4096)
    (tmp_path / "a.safetensors").write_bytes(data)
    assert grave(tmp_path) == ["zero_pages"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


def trained(make: Callable[..., torch.optim.Optimizer], steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    return net, optimizer


OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "RMSprop", "Adadelta", "Rprop", "ASGD")
} | {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, 0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "groups": lambda p: torch.optim.AdamW([{"params": [q for q in p][::-1]}, {"params": []}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_intact_state_of_every_optimizer_is_quiet(tmp_path: Path, name: str) -> None:
    net, optimizer = trained(OPTIMIZERS[name])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    for report in (ng.scan(tmp_path / "a.pt"), ng.preflight(checkpoint=tmp_path / "a.pt")):
        assert report.exit_code == 0, report.findings


def flush(state: dict[int, dict[str, torch.Tensor]]) -> None:
    for entry in state.values():
        entry.update({key: (value * 1e-4).half() for key, value in entry.items() if key != "step"})


def swap(state: dict[int, dict[str, torch.Tensor]]) -> None:
    state[0], state[2] = state[2], state[0]


def other_model(state: dict[int, dict[str, torch.Tensor]]) -> None:
    state[0] |= {key: torch.rand(9, 9) for key in ("exp_avg", "exp_avg_sq")}


STATES: dict[str, tuple[Callable[[dict[int, dict[str, torch.Tensor]]], object], str]] = {
    "empty": (lambda state: state.clear(), "no_optimizer_state"),
    "flushed": (flush, "vanished_moments"),
    "zero second moments": (
        lambda state: [entry["exp_avg_sq"].zero_() for entry in state.values()],
        "vanished_moments",
    ),
    "no elements": (
        lambda state: [e.update(exp_avg=torch.empty(0), exp_avg_sq=torch.empty(0)) for e in state.values()],
        "no_values",
    ),
    "steps alone": (
        lambda state: [(e.pop("exp_avg"), e.pop("exp_avg_sq")) for e in state.values()],
        "no_optimizer_state",
    ),
    "another order": (swap, "optimizer_order"),
    "another model": (other_model, "optimizer_shape"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_that_is_not_of_these_weights(tmp_path: Path, name: str) -> None:
    change, kind = STATES[name]
    net, optimizer = trained(torch.optim.AdamW)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    change(saved["optimizer"]["state"])
    torch.save(saved, tmp_path / "a.pt")
    assert grave(tmp_path / "a.pt") == [kind]


def test_state_of_a_run_that_has_not_begun_may_be_empty(tmp_path: Path) -> None:
    net, optimizer = trained(torch.optim.AdamW, 0)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}, tmp_path / "a.pt")
    assert grave(tmp_path / "a.pt") == []


def test_a_distributed_checkpoint_with_groups_and_no_state(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    net, optimizer = trained(torch.optim.AdamW)
    names, state = [name for name, _ in net.named_parameters()], optimizer.state_dict()
    for is_whole in (True, False):
        entries = {names[n]: entry for n, entry in state["state"].items()} if is_whole else {}
        groups = [{**group, "params": names} for group in state["param_groups"]]
        folder = tmp_path / str(is_whole)
        dcp.save({"model": net.state_dict(), "optim": {"state": entries, "param_groups": groups}}, checkpoint_id=folder)
        assert grave(folder) == ([] if is_whole else ["no_optimizer_state"])


def test_masters_and_their_16_bit_weights(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    for shift, kinds in ((0.0, []), (0.05, ["other_masters"])):
        value = {
            "module": {"a.weight": weight.bfloat16()},
            "buffer_names": [],
            "param_shapes": [{"a.weight": torch.Size((64, 64))}],
            "dp_world_size": 1,
        }
        state = {
            "zero_stage": 2,
            "partition_count": [1],
            "single_partition_of_fp32_groups": [weight.flatten() + shift],
            "base_optimizer_state": {"state": {0: {"exp_avg": torch.rand(4096), "exp_avg_sq": torch.rand(4096)}}},
        }
        torch.save(value, tmp_path / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        assert grave(tmp_path) == kinds
