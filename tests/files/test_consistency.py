"""What files of a folder say of each other: each contradiction, and an intact folder like it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hallo_numguard as ng

Change = Callable[[Path], object]


def grave(path: Path) -> list[str]:
    """Returns the kinds of warnings and errors in a scan."""
    return sorted(finding.kind for finding in ng.scan(path).findings if finding.severity != "info")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def weights(seed: int = 0, layers: int = 4, head: bool = True) -> dict[str, torch.Tensor]:
    """Weights of a small decoder."""
    random = torch.Generator().manual_seed(seed)
    names = {"model.embed_tokens.weight": (48, 16), **({"lm_head.weight": (48, 16)} if head else {})}
    for layer in range(layers):
        parts = {"self_attn.q_proj.weight": (16, 16), "mlp.up_proj.weight": (32, 16), "input_layernorm.weight": (16,)}
        names |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    return {name: torch.randn(shape, generator=random) for name, shape in names.items()}


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 4,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in one file, with its configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    return folder


def shard(folder: Path, count: int = 2, seed: int = 0, index: bool = True) -> None:
    """Writes the weights in several files."""
    names = sorted(weights(seed))
    where = {name: f"model-{number % count + 1:05d}-of-{count:05d}.safetensors" for number, name in enumerate(names)}
    tensors = weights(seed)
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    if index:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


@pytest.fixture
def shards(model: Path) -> Path:
    """The model in two shards with an index."""
    (model / "model.safetensors").unlink()
    shard(model)
    return model


def other_config(**values: Any) -> Change:
    return lambda folder: write_json(folder / "config.json", {**CONFIG, **values})


def without(*parts: str) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if not any(part in name for part in parts)}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return change


def renamed(prefix: str) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")

    return change


def tokenizer(highest: int) -> Change:
    content = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": highest, "content": "<x>"}]}
    return lambda folder: write_json(folder / "tokenizer.json", content)


def both(first: Change, second: Change) -> Change:
    return lambda folder: (first(folder), second(folder))


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda folder: None, []),
        (without("lm_head"), ["missing_head"]),
        (both(without("lm_head"), other_config(tie_word_embeddings=True)), []),
        (other_config(vocab_size=50), ["config"]),
        (other_config(vocab_size=40), []),
        (other_config(hidden_size=32), ["config"]),
        (other_config(hidden_size=32, embedding_size=16), []),
        (other_config(num_hidden_layers=6), ["missing_layer"]),
        (without("layers.1."), ["missing_layer"]),
        (other_config(num_hidden_layers=3), []),
        (tokenizer(48), ["tokenizer"]),
        (tokenizer(47), []),
        (lambda folder: (folder / "config.json").write_text('{"arch'), ["damaged_file"]),
        (without("embed_tokens"), ["missing_embedding"]),
        (both(without("embed_tokens"), other_config(tie_word_embeddings=True)), []),
        (without("layers.2.mlp"), ["missing_tensor"]),
        (without("layers.0.mlp"), []),
        (other_config(architectures=["LlamaForSequenceClassification"]), []),
        (both(without("lm_head"), other_config(architectures=["LlamaForSequenceClassification"])), ["missing_head"]),
        (renamed("_orig_mod."), ["wrapped_names"]),
        (other_config(quantization_config={"quant_method": "bitsandbytes"}), ["config"]),
        (other_config(quantization_config={"quant_method": "torchao"}), []),
    ],
)
def test_a_configuration_and_its_tensors(model: Path, change: Change, kinds: list[str]) -> None:
    change(model)
    assert grave(model) == kinds


def test_experts_that_some_layers_lack(model: Path) -> None:
    experts = {f"model.layers.{n}.mlp.experts.{e}.w1.weight": torch.rand(4, 4) for n in range(4) for e in range(4)}
    save_file({**weights(), **experts}, model / "model.safetensors")
    assert grave(model) == []
    del experts["model.layers.2.mlp.experts.3.w1.weight"]
    save_file({**weights(), **experts}, model / "model.safetensors")
    assert grave(model) == ["missing_expert"]


def leftover_index(folder: Path) -> None:
    """As a download without the files of another format leaves it."""
    content = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name: file.replace("safetensors", "bin") for name, file in content["weight_map"].items()}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": names})


def rename_shards(folder: Path) -> None:
    """As some tools number them: from 0."""
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for file in sorted(folder.glob("model-*")):
        number = int(file.name[6:11]) - 1
        name = f"model.safetensors-{number:05d}-of-00001.safetensors"
        text = text.replace(file.name, name)
        file.rename(folder / name)
    index.write_text(text)


def lose(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda folder: None, []),
        (leftover_index, []),
        (rename_shards, []),
        (lose("model.safetensors.index.json"), []),
        (both(lose("model.safetensors.index.json"), lose(FIRST)), ["missing_shard"]),
        (lose(FIRST), ["missing_shard"]),
        (lambda folder: shard(folder, 3, index=False), ["stale_shard"]),
        (lambda folder: save_file(weights(1), folder / "model.safetensors"), ["stale_weights"]),
        (lambda folder: save_file(weights(0), folder / "model.safetensors"), []),
    ],
)
def test_shards_beside_an_index_and_what_others_left(shards: Path, change: Change, kinds: list[str]) -> None:
    change(shards)
    assert grave(shards) == kinds


def test_an_index_of_shards_that_were_replaced_by_others(shards: Path) -> None:
    content = json.loads((shards / "model.safetensors.index.json").read_text())
    names = {name: file.replace("00002.s", "00030.s") for name, file in content["weight_map"].items()}
    write_json(shards / "model.safetensors.index.json", {"weight_map": names})
    assert grave(shards) == ["missing_shard"]


def test_two_formats_of_the_same_weights(model: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in weights().items()}, model / "pytorch_model.bin")
    assert grave(model) == []
    torch.save(weights(1), model / "pytorch_model.bin")
    assert grave(model) == ["stale_weights"]


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_file_of_weights_without_any(model: Path, save: Callable[..., object]) -> None:
    name = "adapter_model.bin" if save is torch.save else "adapter_model.safetensors"
    save({}, model / name)
    assert grave(model) == ["no_values"]
    save({"base_model.model.a.lora_A.weight": torch.rand(4, 4)}, model / name)
    assert grave(model) == []


def test_the_rank_of_an_adapter(tmp_path: Path) -> None:
    save_file(
        {"a.lora_A.weight": torch.rand(4, 8), "a.lora_B.weight": torch.rand(8, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    for rank, more, kinds in ((4, {}, []), (8, {}, ["config"]), (8, {"rank_pattern": {"a": 4}}, [])):
        write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": rank, **more})
        assert grave(tmp_path) == kinds


@pytest.fixture
def accelerate_folder(tmp_path: Path) -> Path:
    """Two checkpoints of Accelerate, with a scheduler and a loss scaler."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for _ in range(2):
        accelerator.backward(net(torch.randn(4, 8)).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.save_state(str(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "two"


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit(name: str, change: Callable[[Any], object]) -> Change:
    def apply(folder: Path) -> None:
        value = torch.load(folder / name, weights_only=False)
        change(value)
        torch.save(value, folder / name)

    return apply


ACCELERATE: dict[str, Change] = {
    "no optimizer": lose("optimizer.bin"),
    "no scheduler": lose("scheduler.bin"),
    "no random states": lose("random_states_0.pkl"),
    "no scaler": lose("scaler.pt"),
    "no model": lose("model.safetensors"),
    "optimizer of 0 bytes": cut("optimizer.bin", 0),
    "scheduler of 0 bytes": cut("scheduler.bin", 0),
    "random states of 0 bytes": cut("random_states_0.pkl", 0),
    "random states cut": cut("random_states_0.pkl", 3000),
    "scale 0": edit("scaler.pt", lambda value: value.update(scale=0.0)),
    "scale NaN": edit("scaler.pt", lambda value: value.update(scale=float("nan"))),
    "scale tiny": edit("scaler.pt", lambda value: value.update(scale=2.0**-60)),
    "rate NaN": edit("scheduler.bin", lambda value: value.update(_last_lr=[float("nan")])),
    "rate of a group NaN": edit("optimizer.bin", lambda value: value["param_groups"][0].update(lr=float("nan"))),
}


def test_what_a_checkpoint_of_accelerate_lacks(accelerate_folder: Path) -> None:
    folder = accelerate_folder
    assert grave(folder) == []
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, change in ACCELERATE.items():
        change(folder)
        assert len(grave(folder)) == 1, name
        for file, data in whole.items():
            (folder / file).write_bytes(data)


def trainer_folder(folder: Path, step: int = 6) -> Path:
    """A checkpoint as the HF Trainer writes it, of files that torch and safetensors write."""
    folder.mkdir(parents=True)
    net = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(step):
        net(torch.rand(2, 8)).sum().backward()
        optimizer.step()
        scheduler.step()
    save_file(net.state_dict(), folder / "model.safetensors", {"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    write_json(folder / "trainer_state.json", {"global_step": step, "log_history": [{"step": step, "loss": 0.5}]})
    return folder


def other_state(**values: Any) -> Change:
    def change(folder: Path) -> None:
        state = json.loads((folder / "trainer_state.json").read_text())
        write_json(folder / "trainer_state.json", {**state, **values})

    return change


TRAINER: dict[str, tuple[Change, int]] = {
    "intact": (lambda folder: None, 0),
    "weights alone": (
        lambda folder: [(folder / f).unlink() for f in ("optimizer.pt", "scheduler.pt", "rng_state.pth")],
        0,
    ),
    "no optimizer": (lose("optimizer.pt"), 1),
    "no scheduler": (lose("scheduler.pt"), 1),
    "no random states": (lose("rng_state.pth"), 1),
    "no state": (lose("trainer_state.json"), 1),
    "no model": (lose("model.safetensors"), 1),
    "state cut": (cut("trainer_state.json", 20), 1),
    "another step": (other_state(global_step=9000), 2),
    "a loss that is NaN": (other_state(log_history=[{"step": 6, "loss": float("nan")}]), 1),
}


@pytest.mark.parametrize("name", TRAINER)
def test_what_a_checkpoint_of_the_trainer_lacks(tmp_path: Path, name: str) -> None:
    change, count = TRAINER[name]
    trainer_folder(tmp_path / "checkpoint-3", 3)
    folder = trainer_folder(tmp_path / "checkpoint-6")
    change(folder)
    assert len(grave(folder)) == count
    report = ng.preflight(checkpoint=tmp_path)  # each is judged by itself
    assert len([finding for finding in report.findings if finding.severity != "info"]) == count
    assert all("checkpoint-6" in finding.message for finding in report.findings if finding.severity != "info")


TRACKERS = {
    "latest_checkpointed_iteration.txt": ("200", "203", "iter_0000200"),
    "last_checkpoint": ("model_2.pth", "model_3.pth", "model_2.pth"),
    "checkpoint": ('model_checkpoint_path: "a-2"', 'model_checkpoint_path: "a-3"', "a-2"),
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_names_what_is_not_there(tmp_path: Path, name: str) -> None:
    good, bad, there = TRACKERS[name]
    if there.endswith(".pth"):
        torch.save(weights(), tmp_path / there)
    else:
        (tmp_path / there).mkdir()
        torch.save(weights(), tmp_path / there / "model.pt")
    (tmp_path / name).write_text(good)
    assert grave(tmp_path) == []
    (tmp_path / name).write_text(bad)
    assert grave(tmp_path) == ["missing"]


def test_a_newest_checkpoint_of_fewer_ranks(tmp_path: Path) -> None:
    for number in (100, 200):
        for rank in range(2):
            folder = tmp_path / f"iter_{number:07d}" / f"mp_rank_{rank:02d}"
            folder.mkdir(parents=True)
            torch.save({"model": weights()}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200")
    assert grave(tmp_path) == []
    shutil.rmtree(folder)
    assert grave(tmp_path) == ["missing_shard"]


def test_the_shared_store_of_the_hub_is_followed_through_every_hop(model: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    repository, store = hub / "models--a--b", hub / "blobs" / "ab"
    snapshot = repository / "snapshots" / ("c" * 40) / "unet"
    for folder in (repository / "blobs", store, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, store / f"{number:064d}")
        (repository / "blobs" / f"{number:040d}").symlink_to(Path("../../blobs/ab") / f"{number:064d}")
        (snapshot / file.name).symlink_to(Path("../../../blobs") / f"{number:040d}")
    for path in (snapshot, snapshot.parent, repository, hub):
        report = ng.scan(path)
        assert (report.findings, report.exit_code) == ((), 0)
        assert "14 tensors" in report.checked[0]
    (store / f"{1:064d}").unlink()
    assert ng.scan(snapshot).exit_code == 1


def test_linked_and_deep_folders_are_read(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d" / "e" / "f"
    deep.mkdir(parents=True)
    save_file({"weight": torch.full((2, 2), float("nan"))}, deep / "model.safetensors")
    (deep / "up").symlink_to(tmp_path / "a")  # a circle
    (finding,) = ng.scan(tmp_path / "a").findings
    assert finding.message.startswith("b/c/d/e/f/model.safetensors: ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vae").symlink_to(deep.parent)
    linked = ng.scan(tmp_path / "run")
    assert [finding.severity for finding in linked.findings] == ["error", "info"]
    assert "reached by a link out of run" in linked.findings[1].message


def test_a_pipeline_without_one_of_its_parts(tmp_path: Path) -> None:
    parts = {
        "unet": ["diffusers", "UNet2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    write_json(tmp_path / "model_index.json", {"_class_name": "Pipeline", **parts})
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save_file(weights(), tmp_path / name / "diffusion_pytorch_model.safetensors")
    assert grave(tmp_path) == []
    shutil.rmtree(tmp_path / "vae")
    assert grave(tmp_path) == ["missing"]


def test_digits_of_other_kinds_in_names(tmp_path: Path) -> None:
    torch.save({"module": weights()}, tmp_path / "²1_model_states.pt")
    torch.save({"module": weights()}, tmp_path / "mp_rank_\u0660\u0660_model_states.pt")
    assert "28 tensors" in ng.scan(tmp_path).checked[0]
