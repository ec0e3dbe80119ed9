"""Two models compared tensor by tensor."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import hallo_numguard as ng
from hallo_numguard.cli import main
from hallo_numguard.files.formats import UnknownLayout

from weights import QUERY, copy_of_weights, flip_bit, model_folder, place_of

NAN, INF = math.nan, math.inf


def run(*arguments):
    return CliRunner().invoke(main, ["diff", *map(str, arguments)], env={"COLUMNS": "300"})


def told(tmp_path, a, b):
    """What is found between two dicts of tensors: kind and message by name."""
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    report = ng.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    return {finding.name: (finding.kind, finding.message) for finding in report.findings}


def test_a_model_is_identical_to_its_copy():
    report = ng.diff(model_folder(), model_folder() / "model.safetensors")
    assert (report.findings, report.exit_code) == ((), 0)
    assert "104 tensors are identical, of 104 in A" in report.checked[0]


def test_one_flipped_bit_is_one_element_of_one_tensor(tmp_path):
    path = copy_of_weights(tmp_path)
    flip_bit(path, place_of(path, QUERY)[0] + 4 * 1234, 0)
    report = ng.diff(model_folder(), tmp_path)
    (finding,) = report.findings
    assert (finding.kind, finding.name, finding.severity) == ("values_differ", QUERY, "warning")
    assert "differs in 1 of 147456 elements" in finding.message
    assert "103 tensors are identical" in report.checked[0]
    done = run(model_folder(), tmp_path, "--format", "json")
    assert (done.exit_code, json.loads(done.stdout)["findings"][0]["name"]) == (1, QUERY)


def test_every_kind_of_difference_is_told(tmp_path):
    a = {"same": torch.ones(3), "shape": torch.ones(2, 3), "dtype": torch.ones(3), "only_a": torch.ones(1)}
    b = {"same": torch.ones(3), "shape": torch.ones(3, 2), "dtype": torch.ones(3).half(), "only_b": torch.ones(1)}
    found = told(tmp_path, {**a, "values": torch.zeros(4)}, {**b, "values": torch.tensor([0.0, 0.5, -2.0, 0.0])})
    assert found == {
        "shape": ("shape_differs", "shape is 2x3 in A, 3x2 in B"),
        "dtype": ("dtype_differs", "dtype is float32 in A, float16 in B"),
        "values": ("values_differ", "values differs in 2 of 4 elements, by at most 2"),
        "only_a": ("missing_tensor", "only_a is in A only"),
        "only_b": ("extra_tensor", "only_b is in B only"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_what_is_not_finite_is_compared_too(tmp_path, dtype):
    a = torch.tensor([NAN, INF, 1.0, -INF, 2.0]).to(dtype)
    b = torch.tensor([NAN, INF, NAN, 1.0, 2.5]).to(dtype)
    assert told(tmp_path, {"x": a}, {"x": a.clone()}) == {}
    assert told(tmp_path, {"x": a}, {"x": b})["x"][1] == (
        "x differs in 3 of 5 elements, by at most 0.5; 2 are finite in one of them only"
    )


def test_zeros_of_either_sign_differ_in_their_bits(tmp_path):
    found = told(tmp_path, {"x": torch.tensor([0.0, 1.0])}, {"x": torch.tensor([-0.0, 1.0])})
    assert found["x"][1] == "x differs in 1 of 2 elements, by at most 0"


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(0, 4), torch.tensor(3.0), torch.arange(6), torch.tensor([True, False]), torch.tensor([1 + 2j])],
    ids=["empty", "scalar", "integers", "booleans", "complex"],
)
def test_tensors_of_any_kind_can_be_compared(tmp_path, tensor):
    other = ~tensor if tensor.dtype == torch.bool else tensor + 1
    assert told(tmp_path, {"x": tensor}, {"x": tensor.clone()}) == {}
    assert bool(told(tmp_path, {"x": tensor}, {"x": other})) == bool(tensor.numel())


def test_the_same_numbers_in_another_dtype_differ_in_that_alone(tmp_path):
    whole = torch.arange(100.0)
    assert [kind for kind, _ in told(tmp_path, {"x": whole}, {"x": whole.bfloat16()}).values()] == ["dtype_differs"]
    save_file({"x": whole + 1e-3}, tmp_path / "a.safetensors")
    report = ng.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [finding.kind for finding in report.findings] == ["dtype_differs", "values_differ"]


def test_shards_are_compared_with_one_file_and_safetensors_with_torch(tmp_path):
    state = {"first.weight": torch.randn(4, 4), "second.weight": torch.randn(4)}
    for folder in ("one", "shards", "torch"):
        (tmp_path / folder).mkdir()
    save_file(state, tmp_path / "one" / "model.safetensors")
    for number, (name, tensor) in enumerate(state.items(), start=1):
        save_file({name: tensor}, tmp_path / "shards" / f"model-{number:05}-of-00002.safetensors")
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    for folder in ("shards", "torch"):
        report = ng.diff(tmp_path / "one", tmp_path / folder)
        assert (report.findings, report.exit_code) == ((), 0), folder


def test_models_in_one_folder_are_kept_apart(tmp_path):
    for side, value in (("a", 1.0), ("b", 2.0)):
        for part in ("unet", "vae"):
            (tmp_path / side / part).mkdir(parents=True)
            save_file(
                {"conv.weight": torch.full((2,), value if part == "vae" else 0.0)},
                tmp_path / side / part / "w.safetensors",
            )
    (finding,) = ng.diff(tmp_path / "a", tmp_path / "b").findings
    assert "/b/vae/" in finding.file


def test_a_tensor_that_lies_in_two_files_is_not_passed_over_in_silence(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for name in ("x.safetensors", "y.safetensors"):
            save_file({"w": torch.ones(2)}, tmp_path / side / name)
    report = ng.diff(tmp_path / "a", tmp_path / "b")
    assert report.exit_code == 2
    assert len(report.unchecked) == 2


def test_a_damaged_file_is_a_finding(tmp_path):
    path = copy_of_weights(tmp_path)
    with path.open("r+b") as file:
        file.truncate(10_000_000)
    report = ng.diff(model_folder(), tmp_path)
    assert report.exit_code == 1
    assert "error" in {finding.severity for finding in report.findings}


def test_what_is_not_there_or_holds_no_weights_cannot_be_compared(tmp_path):
    (tmp_path / "empty").mkdir()
    for other in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UnknownLayout):
            ng.diff(model_folder(), other)
        assert run(model_folder(), other).exit_code == 2
