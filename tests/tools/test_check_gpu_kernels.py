"""The machine code of the GPU kernels on every architecture: what it must not do, and that planted faults are found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hallo_numguard.ops.formats import FORMATS

TOOLS = Path(__file__).parents[2] / "tools"
PLANTED = Path(__file__).with_name("planted_gpu_kernels.py")
sys.path.append(str(TOOLS))

from gpu_compilers import CUDA_ARCHITECTURES, CUDA_EXTENSION, HIP_TARGET, cuda_extension  # noqa: E402

TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(
    TRITON is None or tuple(map(int, version("triton").split(".")[:2])) < (3, 9),
    reason="the budgets are of Triton 3.9's compiler: that of 3.7.1 spills in one kernel",
)
compiles = pytest.mark.timeout(600)  # whichever test comes first waits for all to be compiled: half a minute alone

MAIN = "import check_gpu_kernels; check_gpu_kernels.main()"
WITHOUT_EXTENSION = f"import sys; sys.modules['{CUDA_EXTENSION}'] = None"
DTYPES = [str(dtype).removeprefix("torch.") for dtype in FORMATS]
CHUNK_KERNELS = [f"chunk {dtype}{detail}" for dtype in DTYPES for detail in ("", " detail")]
TRITON_KERNELS = [f"triton {kernel}" for kernel in (*CHUNK_KERNELS, "combine")]
CUDA_KERNELS = [
    *(f"cuda {kernel} {where}" for kernel in CHUNK_KERNELS for where in ("inline", "table")),
    "cuda combine",
]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=TOOLS,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gpu_kernels") / "report.json"
    done = run("check_gpu_kernels.py", "--json", path)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(path.read_text())


# The kernels


@compiles
@needs_triton
@pytest.mark.parametrize("target", [*CUDA_ARCHITECTURES, HIP_TARGET])
def test_every_kernel_is_clean_and_there_are_no_others(report, target):
    violations = {
        one["variant"]: one["violations"] for one in report["kernels"] if target in (one.get("arch"), one.get("target"))
    }
    of_the_extension = CUDA_KERNELS if cuda_extension() and target != HIP_TARGET else []
    assert violations == {kernel: [] for kernel in (*TRITON_KERNELS, *of_the_extension)}


@compiles
@needs_triton
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: no CUDA kernels are built")
def test_where_nvcc_is_the_cuda_kernels_are_read_too(report):
    assert report["left_out"] == {}


# The command


@compiles
@needs_triton
def test_without_the_extension_the_rest_is_checked_and_this_is_said_and_a_violation_gives_1():
    lower = "import kernel_checks; kernel_checks.BUDGETS['triton', 'chunk', 4, False] = 8"
    done = run("-c", f"{WITHOUT_EXTENSION}; {lower}; {MAIN}", "--arch", "90")
    assert done.returncode == 1, done.stderr
    assert "left out: cuda: the extension with the CUDA kernels is not built" in done.stdout
    assert re.search(r"triton chunk float32, sm_90: takes \d+ registers, more than 8", done.stdout)


@needs_triton
def test_a_backend_that_is_asked_for_must_be_there():
    done = run("-c", f"{WITHOUT_EXTENSION}; {MAIN}", "--backend", "cuda")
    assert done.returncode == 2
    assert "the extension with the CUDA kernels is not built" in done.stderr


def test_without_triton_nothing_can_be_checked():
    hidden = f"import sys; sys.modules['triton'] = None; {MAIN}"
    done = run("-c", hidden)
    assert done.returncode == 2
    assert "triton is not installed" in done.stderr


# Planted faults


@pytest.fixture(scope="module")
def planted() -> dict[str, list[str]]:
    done = run(PLANTED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@compiles
@needs_triton
def test_a_kernel_without_a_fault_passes(planted):
    assert planted["clean"] == []


@compiles
@needs_triton
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("spills", r"keeps values in local memory: \d+ instructions that spill, \d+ bytes of stack"),
        ("takes too many registers", r"takes \d+ registers, more than 64"),
        ("loads narrow", r"loads less than 16 bytes at a time in its main loop: 32 of 4 bytes"),
        ("waits in the loop", r"waits at a barrier in its main loop"),
        ("computes in double", r"the first loop that loads computes in double precision"),
    ],
)
def test_a_planted_fault_is_found(planted, fault, message):
    assert any(re.search(message, text) for text in planted[fault]), planted[fault]
