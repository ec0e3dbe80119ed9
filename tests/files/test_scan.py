"""Scans of real weights: intact, and with one fault each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import hallo_numguard as ng
from hallo_numguard.cli import main
from hallo_numguard.core.findings import Finding

from weights import QUERY, copy_of_weights, flip_bit, model_folder, overwrite, place_of

INDEX = 131 * 384 + 77
PAGE = 4096


def findings(path: Path, kind: str) -> list[Finding]:
    """Returns what a scan finds of one kind; information is nothing found."""
    return [finding for finding in ng.scan(path).findings if finding.kind == kind and finding.severity != "info"]


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Saves the weights with some tensors changed."""
    tensors = load_file(model_folder() / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def page_in(path: Path, tensor: str) -> int:
    """Returns where a whole page of a tensor begins in the file, not the first."""
    return (place_of(path, tensor)[0] // PAGE + 2) * PAGE


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_intact_weights_are_clean(dtype: str | None) -> None:
    report = ng.scan(model_folder() / "model.safetensors", dtype=dtype)
    assert report.ok
    assert report.findings == ()
    assert "103 tensors of floats" in report.checked[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_value_is_named(tmp_path: Path, value: float) -> None:
    path = copy_of_weights(tmp_path)
    overwrite(path, place_of(path, QUERY)[0] + 4 * INDEX, struct.pack("<f", value))
    report = ng.scan(path)
    (finding,) = report.findings
    assert finding.kind == "nonfinite"
    assert finding.offender is not None
    assert finding.offender.index == (131, 77)
    assert finding.name == QUERY
    assert finding.file == str(path)
    assert finding.remedy
    assert report.exit_code == 1


def test_a_flipped_exponent_bit_is_infinite_in_half_precision(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    flip_bit(path, place_of(path, QUERY)[0] + 4 * INDEX, 30)
    (finding,) = (finding for finding in ng.scan(path, dtype="float16").findings if finding.kind == "overflows_dtype")
    assert finding.severity == "error"
    assert f"{QUERY}[131, 77]" in finding.message


def test_the_command_prints_json_and_says_by_its_exit_code_what_was_found(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    clean = CliRunner().invoke(main, ["scan", str(path), "--format", "json"])
    assert (clean.exit_code, json.loads(clean.stdout)["ok"]) == (0, True)
    overwrite(path, place_of(path, QUERY)[0], struct.pack("<f", float("nan")))
    damaged = CliRunner().invoke(main, ["scan", str(path), "--format", "json"])
    assert (damaged.exit_code, json.loads(damaged.stdout)["findings"][0]["kind"]) == (1, "nonfinite")
    missing = CliRunner().invoke(main, ["scan", str(tmp_path / "nothing")])
    assert missing.exit_code == 2
    assert CliRunner().invoke(main, ["scan", str(path), "--dtype", "int8"]).exit_code == 2


def test_zeroed_pages_are_found_with_their_place(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    page = page_in(path, QUERY)
    overwrite(path, page, bytes(2 * PAGE))
    (finding,) = findings(path, "zero_pages")
    assert finding.name == QUERY
    assert f"8192 bytes of parameter {QUERY}" in finding.message
    assert f"offset {page}" in finding.message


def test_zeros_that_do_not_end_with_a_page_are_no_lost_pages(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda tensors: tensors[QUERY][10:40].zero_())
    assert ng.scan(path).ok


def rows_of_zeros() -> dict[str, torch.Tensor]:
    embedding = torch.randn(64, 1024)
    embedding[[0, 5, 6, 63]] = 0
    return {"embeddings.word.weight": embedding}


def rows_twice() -> dict[str, torch.Tensor]:
    block = torch.randn(40, 1024)
    return {"a.weight": torch.cat([block, torch.randn(3, 1024), block]), "b.weight": torch.randn(9, 1024)}


def tied_weights() -> dict[str, torch.Tensor]:
    embedding = torch.randn(100, 64)
    return {"embedding.weight": embedding, "head.weight": embedding.clone()}


def new_adapters() -> dict[str, torch.Tensor]:
    down = {f"layers.{layer}.q.lora_A.weight": torch.randn(8, 64) for layer in range(4)}
    return down | {f"layers.{layer}.q.lora_B.weight": torch.zeros(64, 8) for layer in range(4)}


@pytest.mark.parametrize("make", [rows_of_zeros, rows_twice, tied_weights, new_adapters])
def test_what_intact_models_hold_is_no_fault(tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> None:
    save_file(make(), tmp_path / "model.safetensors")
    assert ng.scan(tmp_path / "model.safetensors").ok


def test_pages_of_another_place_are_found(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    key = QUERY.replace("query", "key")
    page, other = page_in(path, QUERY), page_in(path, key)
    data = path.read_bytes()
    overwrite(path, max(page, other), data[min(page, other) : min(page, other) + PAGE])
    (finding,) = findings(path, "repeated_pages")
    assert finding.name == (QUERY if page > other else key)
    assert (key if page > other else QUERY) in finding.message


def test_a_matrix_that_is_all_zeros_is_found(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda tensors: tensors[QUERY].zero_())
    assert [finding.name for finding in findings(path, "all_zero")] == [QUERY]


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.bias", "encoder.layer.1.output.LayerNorm.bias"])
def test_biases_may_be_zeros(tmp_path: Path, name: str) -> None:
    assert ng.scan(rewritten(tmp_path, lambda tensors: tensors[name].zero_())).ok


def test_a_matrix_far_larger_than_in_other_layers_is_found(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda tensors: tensors[QUERY].mul_(1e4))
    (finding,) = findings(path, "outlier")
    assert finding.name == QUERY
    assert "other layers" in finding.message


def test_one_value_that_outweighs_all_others_is_found_without_other_layers(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    assert ng.scan(tmp_path / "a.safetensors").ok
    weight[3, 4] = 1e6
    save_file({"weight": weight}, tmp_path / "a.safetensors")
    (finding,) = findings(tmp_path / "a.safetensors", "outlier")
    assert "outweighs all others" in finding.message


def test_a_matrix_of_another_layer_is_found(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda tensors: tensors[QUERY].copy_(tensors[QUERY.replace("2", "4")]))
    (finding,) = findings(path, "duplicate")
    assert QUERY in finding.message
    assert QUERY.replace("2", "4") in finding.message


def test_layers_that_were_all_initialised_alike_are_no_fault(tmp_path: Path) -> None:
    layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 128), 4, enable_nested_tensor=False)
    torch.save(layers.state_dict(), tmp_path / "a.pt")
    assert ng.scan(tmp_path / "a.pt").ok


def test_a_layer_of_another_dtype_is_found(tmp_path: Path) -> None:
    path = rewritten(tmp_path, lambda tensors: tensors.update({QUERY: tensors[QUERY].half()}))
    (finding,) = findings(path, "dtype")
    assert finding.name == QUERY
    assert "float16, and in other layers float32" in finding.message


def test_masks_hold_minus_infinity(tmp_path: Path) -> None:
    mask = torch.full((64, 64), float("-inf")).triu(1)
    save_file({"causal_mask": mask, "weight": torch.randn(64, 64)}, tmp_path / "a.safetensors")
    report = ng.scan(tmp_path / "a.safetensors", dtype="float16")
    assert report.ok
    assert [finding.severity for finding in report.findings] == ["info"]
    save_file({"weight": mask}, tmp_path / "a.safetensors")
    assert ng.scan(tmp_path / "a.safetensors").exit_code == 1


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    save_file({"a\x1b[31m[/x]\u202e": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    result = CliRunner().invoke(main, ["scan", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "\u202e" not in result.output


def test_several_paths_are_one_report(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    overwrite(path, place_of(path, QUERY)[0], struct.pack("<f", float("inf")))
    seen: list[tuple[int, int]] = []
    report = ng.scan(
        model_folder(), path, tmp_path / "nothing", progress=lambda done, total: seen.append((done, total))
    )
    assert report.exit_code == 1
    assert len(report.checked) == 2
    assert len(report.unchecked) == 1
    assert sum(done for done, _ in seen) == seen[0][1] == 2 * path.stat().st_size


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 500, "pad_token_id": 0}
MODELS = {
    "GPT2Config": {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 500},
    "LlamaConfig": {"num_hidden_layers": 4, "num_key_value_heads": 2, **SMALL},
    "MixtralConfig": {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4, **SMALL},
    "T5Config": {"num_layers": 3, "d_model": 64, "d_ff": 128, "vocab_size": 500},
    "MambaConfig": {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 500},
    "ViTConfig": {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}


@pytest.mark.parametrize("config", MODELS)
def test_new_models_of_many_kinds_raise_no_alarm(tmp_path: Path, config: str) -> None:
    import transformers

    model = transformers.AutoModel.from_config(getattr(transformers, config)(**MODELS[config]))
    model.half().save_pretrained(tmp_path / "half")
    torch.save(model.float().state_dict(), tmp_path / "float.pt")
    for path in (tmp_path / "half", tmp_path / "float.pt"):
        for dtype in (None, "float16"):
            report = ng.scan(path, dtype=dtype)
            assert report.ok, report.findings
