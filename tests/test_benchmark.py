from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hallo_numguard.ops import dispatch, native

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--size", "0.00390625", "--size", "0.0625", "--seconds", "1", "--no-compile"]
PEERS = {
    "isfinite_all",
    "idiom",
    "idiom_per_segment",
    "aminmax_norm",
    "aminmax_foreach_norm",
    "amp_unscale",
}
OURS = {"ours_native", "ours_public", "ours_public_detail", "ours_public_one_segment", "ours_list"}

needs_native = pytest.mark.skipif(native.extension() is None, reason="measures the extension")


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in (dispatch.BACKEND_VARIABLE, native.ISA_VARIABLE)
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BENCHMARKS,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_native
def test_quick_run_measures_ours_and_the_peers(tmp_path):
    found = tmp_path / "found.json"
    done = run_python("overhead.py", "--quick", *TINY, "--json", str(found))
    assert done.returncode == 0, done.stderr
    run = json.loads(found.read_text())
    measured = {sample["candidate"] for sample in run["samples"]}
    assert {"read", "read_prefetched"} | OURS | PEERS <= measured
    assert ("deepspeed" in measured) != ("deepspeed" in run["skipped"])
    assert "compile" in run["skipped"]
    for sample in run["samples"]:
        assert sample["fraction"] > 0, sample
        assert 0 < sample["p20_us"] <= sample["median_us"] <= sample["p80_us"], sample
    assert {sample["size"] for sample in run["samples"]} == {4096, 65536}
    assert {sample["dtype"] for sample in run["samples"]} == {"fp32", "bf16"}
    assert all({"promise", "figure", "met"} == set(target) for target in run["targets"])
    assert "ours: tensor_stats" in done.stdout
    assert "Targets" in done.stdout


@needs_native
def test_no_more_segments_than_elements(tmp_path):
    found = tmp_path / "found.json"
    tiny = ["--size", "0.0000152587890625", "--dtype", "fp32", "--seconds", "0.1"]
    done = run_python("overhead.py", "--quick", *tiny, "--no-compile", "--json", str(found))
    assert done.returncode == 0, done.stderr
    assert {sample["segments"] for sample in json.loads(found.read_text())["samples"]} == {4}


@needs_native
def test_picture(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib draws it")
    picture = tmp_path / "picture.png"
    done = run_python("overhead.py", "--quick", *TINY, "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_native
def test_wrong_result_stops_it():
    lie = "peers._idiom = lambda values: (torch.ones(()),) * 3"
    lying = f"import overhead, peers, torch; {lie}; overhead.main()"
    done = run_python("-c", lying, "--quick", *TINY)
    assert done.returncode == 1
    assert "wrong result" in done.stderr
    assert "isfinite + abs.max + norm" in done.stderr


@needs_native
def test_other_backend_is_refused():
    done = run_python("overhead.py", "--quick", *TINY, **{dispatch.BACKEND_VARIABLE: "reference"})
    assert done.returncode == 2
    assert dispatch.BACKEND_VARIABLE in done.stderr


def test_missing_extension_is_said():
    hidden = "import sys; sys.modules['hallo_numguard._native'] = None; import overhead; overhead.main()"
    done = run_python("-c", hidden, "--quick", *TINY)
    assert done.returncode == 2
    assert "extension was not built" in done.stderr


def test_missing_matplotlib_is_said():
    if native.extension() is None:
        pytest.skip("the extension is asked for first")
    hidden = "import sys; sys.modules['matplotlib'] = None; import overhead; overhead.main()"
    done = run_python("-c", hidden, "--quick", *TINY, "--plot", "never.png")
    assert done.returncode == 2
    assert "hallo-numguard[bench]" in done.stderr
