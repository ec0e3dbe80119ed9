"""Preflight: each question has a real planted defect that it finds, and a clean counterpart on which it is silent."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import hallo_numguard as ng
from hallo_numguard.cli import main

import deepspeed_support as support
import faulty
from weights import QUERY, copy_of_weights, flip_bit, model_folder, place_of


def of_kind(report, kind):
    return [finding for finding in report.findings if finding.kind == kind]


def grave(report):
    """Findings that a person has to look at."""
    return [str(finding) for finding in report.findings if finding.severity != "info"]


def minilm():
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.from_pretrained(str(model_folder())))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints that real engines have saved after three steps, by stage."""
    root = tmp_path_factory.mktemp("checkpoints")
    for stage in (0, 2, 3):
        engine = support.make_engine("fp16", stage=stage, scale_power=8)
        for step in range(3):
            support.train_step(engine, step)
        engine.save_checkpoint(str(root / f"stage{stage}"))
    return root


@pytest.fixture
def checkpoint(checkpoints, tmp_path, request):
    """A copy of one of them, to be damaged."""
    stage = getattr(request, "param", 2)
    return Path(shutil.copytree(checkpoints / f"stage{stage}", tmp_path / f"stage{stage}"))


def edit(checkpoint, pattern, change):
    """Changes what a file of a checkpoint holds, as a fault of the code that wrote it would."""
    (path,) = checkpoint.rglob(pattern)
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


# -- (a) integrity and (b) values -----------------------------------------------------------------------------------


def test_a_changed_file_is_found_by_its_manifest_and_by_its_values(tmp_path):
    path = copy_of_weights(tmp_path)
    ng.write_manifest(tmp_path)
    clean = ng.preflight(model=tmp_path, dtype="float16")
    assert clean.ok, grave(clean)
    flip_bit(path, place_of(path, QUERY)[0] + 4 * 1000, 30)
    report = ng.preflight(model=tmp_path, dtype="float16")
    assert report.exit_code == 1
    assert any(QUERY in finding.message for finding in of_kind(report, "overflows_dtype"))
    assert any(finding.name == QUERY and "changed" in finding.kind for finding in report.findings), report.findings


def test_without_a_manifest_it_says_that_only_values_were_looked_at(tmp_path):
    copy_of_weights(tmp_path)
    report = ng.preflight(model=tmp_path)
    assert report.ok, grave(report)
    assert any("No manifest" in sentence for sentence in report.checked)


def test_a_manifest_elsewhere_is_used_and_one_that_is_missing_is_no_silence(tmp_path):
    copy_of_weights(tmp_path / "..").rename(tmp_path / "model.safetensors")
    ng.write_manifest(tmp_path)
    sums = (tmp_path / "SHA256SUMS").rename(tmp_path.parent / "elsewhere.sums")
    for name in ("numguard.manifest.json", "numguard.tensors.json"):
        (tmp_path / name).unlink()
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "numguard" not in line))
    assert ng.preflight(model=tmp_path, manifest=sums).ok
    assert not ng.preflight(model=tmp_path, manifest=tmp_path / "nowhere").ok


# -- (c) names, shapes, and what was loaded ---------------------------------------------------------------------------


def saved(tmp_path, change):
    """A file of MiniLM's weights with other names or shapes."""
    state = load_file(str(model_folder() / "model.safetensors"))
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(state).items()}, str(path))
    return path


def test_a_model_that_holds_its_file_is_clean(tmp_path):
    path = copy_of_weights(tmp_path)
    model = minilm()
    model.load_state_dict(load_file(str(path)), strict=False)
    assert not grave(ng.preflight(model, model=path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.encoder_a."])
def test_a_prefix_is_named_once_and_not_every_name(tmp_path, prefix):
    path = saved(tmp_path, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    model = minilm()
    model.load_state_dict(load_file(str(path)), strict=False)  # loads nothing, and says nothing
    report = ng.preflight(model, model=path)
    (finding,) = [finding for finding in report.findings if finding.severity == "error"]
    assert finding.kind == "prefix"
    assert f"{prefix!r}" in finding.message
    assert "0 of 104 would be loaded" in finding.message


def test_the_model_may_be_the_one_with_the_prefix(tmp_path):
    path = copy_of_weights(tmp_path)
    wrapped = nn.Module()
    wrapped.module = minilm()
    (finding,) = [item for item in ng.preflight(wrapped, model=path).findings if item.severity == "error"]
    assert finding.kind == "prefix"
    assert "with 'module.'" in finding.message


def test_a_renamed_tensor_is_suggested_and_missing_unexpected_and_misshapen_ones_are_listed(tmp_path):
    def change(state):
        layer = "encoder.layer.1.attention.self"
        state[f"{layer}.qurey.weight"] = state.pop(f"{layer}.query.weight")
        del state["pooler.dense.bias"]
        state["something.else"] = torch.zeros(3)
        state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][:100].clone()
        return state

    report = ng.preflight(minilm(), model=saved(tmp_path, change))
    missing = {finding.name: finding.message for finding in of_kind(report, "missing_key")}
    assert missing.keys() == {"encoder.layer.1.attention.self.query.weight", "pooler.dense.bias"}
    renamed = missing["encoder.layer.1.attention.self.query.weight"]
    assert "perhaps it is called encoder.layer.1.attention.self.qurey.weight there" in renamed
    assert [finding.name for finding in of_kind(report, "unexpected_key")] == ["something.else"]
    (shape,) = of_kind(report, "shape")
    assert "100x384" in shape.message
    assert "30522x384" in shape.message


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        ("encoder.layer.", "encoder.blocks.", "prefix", "begin with 'encoder.blocks.'"),
        (".attention.", ".attn.", "renamed", "calls 'attention' 'attn' in 60 names, such as encoder.layer.0.attn."),
    ],
)
def test_a_renamed_block_is_named_once_and_not_every_name_in_it(tmp_path, old, new, kind, words):
    path = saved(tmp_path, lambda state: {name.replace(old, new): tensor for name, tensor in state.items()})
    (finding,) = [item for item in ng.preflight(minilm(), model=path).findings if item.severity == "error"]
    assert finding.kind == kind
    assert words in finding.message


def test_weights_of_other_layers_are_no_renamed_block(tmp_path):
    def change(state):
        return {name.replace("encoder.layer.5.", "encoder.layer.7."): tensor for name, tensor in state.items()}

    report = ng.preflight(minilm(), model=saved(tmp_path, change))
    assert not of_kind(report, "renamed")
    assert len(of_kind(report, "missing_key")) == 16


def test_a_tied_weight_needs_one_of_its_names(tmp_path):
    model = support.Model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
    save_file(state, str(tmp_path / "model.safetensors"))
    assert not grave(ng.preflight(model, model=tmp_path))


def test_weights_that_were_not_loaded_are_told_though_the_names_are_right(tmp_path):
    path = copy_of_weights(tmp_path)
    (finding,) = of_kind(ng.preflight(minilm(), model=path), "not_loaded")
    assert finding.severity == "warning"
    model = minilm()
    state = load_file(str(path))
    del state[QUERY]
    model.load_state_dict(state, strict=False)
    (finding,) = of_kind(ng.preflight(model, model=path), "not_loaded")
    assert (finding.severity, finding.name) == ("info", QUERY)


@pytest.mark.parametrize("checkpoint", [0, 2, 3], indirect=True)
def test_names_of_a_checkpoint_are_compared_with_the_model(checkpoint):
    assert not grave(ng.preflight(support.Model().half(), checkpoint=checkpoint, dtype="float16"))
    model = support.Model().half()
    model.extra = nn.Linear(2, 2)
    assert [item.name for item in of_kind(ng.preflight(model, checkpoint=checkpoint), "missing_key")] == [
        "extra.weight",
        "extra.bias",
    ]


# -- (d) optimizer state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [0, 2, 3], indirect=True)
def test_an_intact_checkpoint_is_clean(checkpoint):
    report = ng.preflight(checkpoint=checkpoint, world_size=1, zero_stage=int(checkpoint.name[-1]), dtype="float16")
    assert report.exit_code == 0, grave(report)
    assert any("Optimizer state" in sentence for sentence in report.checked)


def moments(value):
    return value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def make_negative(value):
    moments(value)["exp_avg_sq"][5] = -1.0


def make_nan(value):
    moments(value)["exp_avg"][7] = float("nan")


def lose_moment(value):
    del moments(value)["exp_avg_sq"]


def lose_state(value):
    value["optimizer_state_dict"]["base_optimizer_state"]["state"].clear()


def cut_short(value):
    for name in ("exp_avg", "exp_avg_sq"):
        moments(value)[name] = moments(value)[name][:300].clone()


def forget_steps(value):
    state = value["optimizer_state_dict"]["base_optimizer_state"]
    moments(value)["step"] = torch.tensor(0.0)
    for group in state["param_groups"]:
        group.pop("step", None)


def run_ahead(value):
    moments(value)["step"] = torch.tensor(9000.0)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (make_negative, "negative_moment", "exp_avg_sq of "),
        (make_nan, "nonfinite", "exp_avg of "),
        (lose_moment, "missing_state", "lacks exp_avg_sq of "),
        (lose_state, "no_optimizer_state", "holds no moments"),
        (cut_short, "missing_state", "holds no moments of "),
        (forget_steps, "step_counters", "has counted no step, and the run 3"),
        (run_ahead, "step_counters", "has counted 9000 steps, and the run 3"),
    ],
)
def test_damage_of_the_optimizer_state_is_named(checkpoint, change, kind, words):
    edit(checkpoint, "*optim_states.pt", change)
    report = ng.preflight(checkpoint=checkpoint)
    assert any(words in finding.message for finding in of_kind(report, kind)), report.findings
    assert report.exit_code == 1


def test_parameters_that_were_unfrozen_later_may_have_counted_fewer_steps(tmp_path):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for is_trained in (False, True, True):
        model.bias.requires_grad_(is_trained)
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert not grave(ng.preflight(checkpoint=path))


def test_another_number_of_groups_and_other_hyperparameters_are_told(checkpoint):
    engine = support.make_engine("fp16", stage=2)
    clean = ng.preflight(engine, checkpoint=checkpoint)
    assert not of_kind(clean, "param_groups")
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.5
    (finding,) = of_kind(ng.preflight(engine, checkpoint=checkpoint), "param_groups")
    assert "lr was 0.001" in finding.message
    engine.optimizer.param_groups.append(dict(engine.optimizer.param_groups[0]))
    (finding,) = of_kind(ng.preflight(engine, checkpoint=checkpoint), "param_groups")
    assert "1 parameter groups, and the optimizer 2" in finding.message
    engine.optimizer.param_groups.pop()


# -- (e) number of processes, stage, dtype, whole -------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [2, 3], indirect=True)
def test_another_number_of_processes_is_found_before_deepspeed_does(checkpoint):
    report = ng.preflight(checkpoint=checkpoint, world_size=4)
    (finding,) = of_kind(report, "world_size")
    assert "written by 1 processes" in finding.message
    assert "Start with 1 processes, or convert it with DeepSpeed's ds_to_universal.py" in finding.remedy


@pytest.mark.parametrize("checkpoint", [0], indirect=True)
def test_stage_0_loads_with_any_number(checkpoint):
    assert ng.preflight(checkpoint=checkpoint, world_size=4).ok


def test_another_stage_and_another_dtype_are_told(checkpoint):
    report = ng.preflight(checkpoint=checkpoint, zero_stage=3, dtype="bfloat16")
    (stage,) = of_kind(report, "zero_stage")
    assert "ZeRO stage 2, and the run has stage 3" in stage.message
    (dtype,) = of_kind(report, "dtype")
    assert "float16, and the run is in bfloat16" in dtype.message


def test_latest_that_points_to_nothing_is_told(checkpoint):
    (checkpoint / "latest").write_text("global_step77")
    report = ng.preflight(checkpoint=checkpoint)
    assert report.exit_code == 1
    assert any("global_step77" in finding.message for finding in report.findings)


# -- (f) loss scaler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "severity"), [(256.0, None), (4.0, "warning"), (1.0, "error"), (float("nan"), "error")]
)
def test_a_checkpoint_saved_at_the_minimum_loss_scale_is_told(checkpoint, scale, severity):
    def change(value):
        value["optimizer_state_dict"]["loss_scaler"].cur_scale = scale

    edit(checkpoint, "*optim_states.pt", change)
    found = of_kind(ng.preflight(checkpoint=checkpoint), "loss_scale")
    assert [finding.severity for finding in found] == ([] if severity is None else [severity])


# -- (g) launcher and precision ----------------------------------------------------------------------------------------

FP16 = {"fp16": {"enabled": True, "loss_scale": 0}, "zero_optimization": {"stage": 2}}


@pytest.fixture
def launched(monkeypatch):
    """Runs preflight with the variables of a launcher, and returns the messages about it."""

    def run(*arguments, environment=None, **options):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        return [finding.message for finding in of_kind(ng.preflight(*arguments, **options), "launcher")]

    return run


def test_plain_python_where_a_launcher_was_meant_is_told(launched):
    asked = {"config": FP16, "world_size": 2}
    (plain,) = launched(nn.Linear(2, 2), **asked)
    assert "started with plain python, and 2 processes" in plain
    assert not launched(nn.Linear(2, 2), **asked, environment={"RANK": "0", "WORLD_SIZE": "2"})
    (other,) = launched(nn.Linear(2, 2), **asked, environment={"RANK": "0", "WORLD_SIZE": "4"})
    assert "has started 4 processes, and 2 were asked for" in other
    on_cpu = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    (cpu,) = launched(nn.Linear(2, 2), **asked, environment=on_cpu)
    assert "leaves DeepSpeed out" in cpu
    assert not launched(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FP16, None),
        ({"bf16": {"enabled": True}}, None),
        ({**FP16, "bf16": {"enabled": True}}, "both fp16 and bf16"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "never changes"),
        ({"fp16": {"enabled": "auto"}}, None),
    ],
)
def test_blocks_that_do_not_go_together_are_told(config, words):
    found = of_kind(ng.preflight(config=config), "precision")
    assert [words in finding.message for finding in found] == ([] if words is None else [True])


def test_half_weights_with_fp16_switched_off_are_reported(tmp_path):
    path = saved(tmp_path, lambda state: {name: tensor.half() for name, tensor in state.items()})
    (finding,) = of_kind(ng.preflight(model=path, config={"fp16": {"enabled": False}}), "precision")
    assert "holds weights in float16" in finding.message
    assert not of_kind(ng.preflight(model=path, config=FP16), "precision")
    assert not of_kind(ng.preflight(model=path), "precision")


# -- (h) smoke step ---------------------------------------------------------------------------------------------------


def everything(engine):
    """All that a smoke step must leave alone."""
    state = [engine.module.state_dict(), engine.optimizer.state_dict()]
    tensors = [tensor.clone() for tensor in support_tensors(state)]
    return [*tensors, torch.get_rng_state(), *(p.grad for p in engine.module.parameters() if p.grad is not None)]


def support_tensors(value):
    from hallo_numguard.tracing.nested import tensors_in

    return [tensor for _, tensor in tensors_in("", value)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_smoke_step_finds_what_training_would_and_changes_nothing(stage):
    engine = support.make_engine("fp16", stage=stage, scale_power=4, model=faulty.Faulty().half())
    support_step(engine, 0)
    tokens = faulty.tokens(1)
    before = everything(engine)

    def loss_fn(output):
        return nn.functional.cross_entropy(output.float().flatten(0, 1), tokens.flatten())

    clean = ng.preflight(engine, batch=(tokens,), loss_fn=loss_fn)
    assert not of_kind(clean, "smoke"), clean.findings
    assert any(sentence.startswith("Smoke step: loss ") for sentence in clean.checked)
    for fault, (layer, name, phase) in faulty.FAULTS.items():
        if not layer:
            continue
        faulty.damage(engine, fault)
        (finding,) = of_kind(ng.preflight(engine, batch=(tokens,), loss_fn=loss_fn), "smoke")
        assert finding.name == name, fault
        assert ("the loss is finite" in finding.message) == (phase == "backward")
        engine.module.get_submodule(layer).broken = False
    after = everything(engine)
    assert len(after) == len(before)
    changed = [
        place for place, (one, other) in enumerate(zip(before, after, strict=True)) if not torch.equal(one, other)
    ]
    assert not changed, [(before[place], after[place]) for place in changed]


def support_step(engine, step):
    tokens = faulty.tokens(step)
    loss = nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
    engine.backward(loss)
    engine.step()


class WithLoss(nn.Module):
    """Returns a dict with a loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, y=None):
        out = self.layer(x)
        return {"out": out} if y is None else {"out": out, "loss": (out - y).square().mean()}


def test_a_loss_far_from_that_of_then_is_told(tmp_path):
    torch.manual_seed(0)
    model = WithLoss()
    batch = {"x": torch.randn(4, 4), "y": torch.zeros(4, 1)}
    loss = model(**batch)["loss"].item()
    assert not grave(ng.preflight(model, batch=batch, expected_loss=loss))
    (finding,) = of_kind(ng.preflight(model, batch=batch, expected_loss=loss / 10), "smoke")
    assert "when the checkpoint was saved" in finding.message
    keeper = ng.CheckpointKeeper(tmp_path / "kept")
    checkpoint = keeper.save({"model": model}, step=1, loss=loss / 10)
    assert of_kind(ng.preflight(model, checkpoint=checkpoint.path, batch=batch), "smoke")


def test_a_model_without_a_loss_and_one_that_fails_are_told_without_a_traceback():
    batch = {"x": torch.randn(4, 4)}
    report = ng.preflight(WithLoss(), batch=batch)
    assert report.exit_code == 0
    assert any("the model returns no loss" in sentence for sentence in report.checked)
    report = ng.preflight(WithLoss(), batch=batch, loss_fn=lambda output: None)
    assert report.exit_code == 2
    assert "give loss_fn" in report.unchecked[0]
    (finding,) = of_kind(ng.preflight(WithLoss(), batch={"z": 1}), "smoke")
    assert "TypeError" in finding.message


def test_a_target_that_is_nothing_of_the_kind_is_refused():
    with pytest.raises(ng.InvalidInput, match=r"preflight\(\) takes a torch\.nn\.Module"):
        ng.preflight("model")
    with pytest.raises(ng.InvalidInput, match=r"ds\.json cannot be read"):
        ng.preflight(config="ds.json")


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    done = CliRunner().invoke(main, ["preflight", *map(str, arguments)], env={"COLUMNS": "300"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


BUILD = """
import torch
from torch import nn

def build():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), Mean()), (torch.ones(2, 4),)

class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()
"""


def test_the_command_exits_with_0_1_or_2(tmp_path, checkpoint):
    clean = command("--checkpoint", checkpoint, "--world-size", 1, "--dtype", "float16")
    assert clean.exit_code == 0, clean.stdout
    assert "Nothing was found." in clean.stdout
    wrong = command("--checkpoint", checkpoint, "--world-size", 8, "--format", "json")
    assert wrong.exit_code == 1
    document = json.loads(wrong.stdout)
    assert document["exit_code"] == 1
    assert document["findings"][0]["kind"] == "world_size"
    assert command("--checkpoint", tmp_path / "nowhere").exit_code == 2
    assert command().exit_code == 2
    (tmp_path / "ds.json").write_text("{")
    assert command("--config", tmp_path / "ds.json").exit_code == 2


def test_the_command_builds_the_model_and_makes_a_smoke_step_on_the_weights_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    (tmp_path / "user_code.py").write_text(BUILD)
    state = {
        "0.weight": torch.randn(8, 4),
        "0.bias": torch.zeros(8),
        "2.weight": torch.randn(1, 8),
        "2.bias": torch.zeros(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(state, str(path))
    arguments = ("--model", path, "--build", "user_code:build")
    done = command(*arguments)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "Smoke step: loss" in done.stdout
    state["2.weight"][0, 3] = float("nan")
    save_file(state, str(path))
    done = command(*arguments)
    assert done.exit_code == 1
    assert "2.weight" in done.stdout
    assert "smoke step: the loss is NaN" in done.stdout
    missing = command("--model", path, "--build", "user_code:nothing")
    assert missing.exit_code == 2
    assert "--build user_code:nothing failed" in missing.stderr
