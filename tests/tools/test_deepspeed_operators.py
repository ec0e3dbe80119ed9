"""What the builder of DeepSpeed's operators says instead of waiting or failing without a word."""

from __future__ import annotations

import sys
from pathlib import Path

from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import deepspeed_operators


def build(folder, *arguments):
    return CliRunner().invoke(deepspeed_operators.main, ["--folder", str(folder), *arguments])


def test_a_lock_of_an_interrupted_build_is_told_and_not_waited_for(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    result = build(tmp_path)
    assert result.exit_code == 1
    assert str(lock) in result.output
    assert "delete the file" in result.output


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    result = build(tmp_path, "cpu_adam")
    assert result.exit_code == 1
    assert "no-such-compiler" in result.output


def test_what_is_built_is_not_built_again(tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "lock").touch()
    assert build(tmp_path, "cpu_adam").exit_code == 0
