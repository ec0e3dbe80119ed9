"""Scans of real weights: intact, and with one fault each."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from weights import copy_of_weights, flip_bit, model_folder, overwrite, place_of

import hallo_numguard as ng
from hallo_numguard.cli import main

QUERY = "encoder.layer.2.attention.self.query.weight"
INDEX = 131 * 384 + 77


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
    (finding,) = (finding for finding in ng.scan(path, dtype="float16").findings if finding.kind == "unholdable")
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
