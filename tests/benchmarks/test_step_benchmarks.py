from __future__ import annotations

import json

import pytest
from benchmark_support import needs_native, run_python


@needs_native
@pytest.mark.parametrize("case", ["fp16-2", "bf16-3-offload"])
def test_steps_of_deepspeed(tmp_path, case):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    found = tmp_path / "found.json"
    done = run_python("deepspeed_step.py", "--quick", "--rounds", "1", "--case", case, "--json", str(found))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(found.read_text())["results"]
    assert result["case"] == case
    assert result["theirs_ms"] > 0
    assert result["ours_ms"] > 0
    assert "Guarded steps" in done.stdout


@needs_native
def test_the_trace_is_measured_against_its_peers(tmp_path):
    found = tmp_path / "found.json"
    done = run_python("trace.py", "--quick", "--model", "unet", "--json", str(found))
    assert done.returncode == 0, done.stderr
    rows = {row["way"]: row for row in json.loads(found.read_text())["results"]}
    assert rows.keys() == {"plain", "trace", "DebugUnderflowOverflow", "isfinite hook"}
    assert rows["plain"]["ratio"] is None
    assert all(row["milliseconds"] > 0 for row in rows.values())


@needs_native
def test_steps_of_a_plain_optimizer(tmp_path):
    found = tmp_path / "found.json"
    cases = ("fp32-25M-200-foreach", "bf16-25M-1-fused")
    options = [option for case in cases for option in ("--case", case)]
    done = run_python("optimizer_step.py", "--quick", *options, "--json", str(found))
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())["results"]
    assert [result["case"] for result in results] == list(cases)
    for result in results:
        assert result["ratios"].keys() == {"step", "torch", "guard", "guard, clips", "guard, within"}
        assert result["ratios"]["torch"] == 1.0
        assert all(ratio > 0 for ratio in result["ratios"].values())


@needs_native
def test_the_looks_around_an_update(tmp_path):
    found = tmp_path / "found.json"
    done = run_python("update_looks.py", "--quick", "--json", str(found))
    assert done.returncode == 0, done.stderr
    rows = {row["mode"]: row for row in json.loads(found.read_text())["results"]}
    assert rows.keys() == {"part", "all"}
    assert all(row["looks_ms"] > 0 and row["step_ms"] > 0 for row in rows.values())


@needs_native
def test_the_check_before_a_save(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    found = tmp_path / "found.json"
    done = run_python("save_gate.py", "--quick", "--json", str(found))
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(found.read_text())["results"]}
    assert rows["state"]["mebibytes"] > 2 * rows["model"]["mebibytes"]
    assert all(row["check_ms"] > 0 and row["save_ms"] > 0 for row in rows.values())
