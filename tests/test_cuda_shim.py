"""The shim that runs CUDA kernels on the CPU: right kernels pass in every order, planted faults are found."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).parent / "cuda_shim"
SOURCE = SHIM / "selftest.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-g", "-x", "c++", "-DNUMGUARD_CUDA_SHIM", "-include", str(SHIM / "cuda_shim.h")]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = ["forward", "reverse", "shuffled"]
ABORTED, WRONG = -6, 1

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="neither g++ nor c++ is on the PATH"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the shim is written for Linux on x86-64"
    ),
]


def compile_with(*arguments):
    command = [COMPILER, *FLAGS, *WARNINGS, "-ffp-contract=off", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    program = tmp_path_factory.mktemp("plain") / "selftest"
    done = compile_with(SOURCE, "-o", program)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    if compile_with(*SANITIZERS, empty, "-o", folder / "empty").returncode != 0:
        pytest.skip("the compiler comes without AddressSanitizer or UndefinedBehaviorSanitizer")
    done = compile_with(*SANITIZERS, SOURCE, "-o", folder / "selftest")
    assert done.returncode == 0, done.stderr
    return folder / "selftest"


@pytest.fixture(params=["plain", "sanitized"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


def run(program, mode, order):
    settings = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    return subprocess.run(
        [program, mode, order], env=settings, cwd=program.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("seed", ["", ":2", ":3"])
def test_right_kernels_pass_in_shuffled_orders(plain, seed):
    done = run(plain, "checks", f"shuffled{seed}")
    assert (done.returncode, done.stderr) == (0, "")


def test_right_kernels_pass_in_every_order_and_without_a_word_of_the_sanitizers(either, order):
    done = run(either, "checks", order)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing_barrier", "wrong: reversal"),
        ("missing_barrier_in_one_order", "wrong: broadcast"),
        ("missing_second_barrier", "wrong: sum over two rounds"),
    ],
)
def test_a_missing_barrier_gives_a_wrong_result_in_some_order(either, fault, message):
    runs = [run(either, fault, order) for order in ORDERS]
    found = [done for done in runs if done.returncode == WRONG]
    assert found
    assert all(message in done.stderr for done in found)


def test_one_order_is_not_enough_to_miss_a_barrier(plain):
    codes = {order: run(plain, "missing_barrier_in_one_order", order).returncode for order in ORDERS}
    assert codes["forward"] == 0
    assert codes["reverse"] == WRONG


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_shuffle", r"divergent warp: .*__shfl_xor_sync\(0xffffffff\)"),
        ("divergent_branches", r"divergent warp: .*but lane \d+ waits in __(any|ballot)_sync\(0xffffffff\)"),
        ("divergent_masks", r"divergent warp: __syncwarp\(0x\w+\) .*waits in __syncwarp\(0x\w+\)"),
        ("outside_of_own_mask", r"__syncwarp\(0x0000ffff\) .*lane \d+ is not in its own mask"),
        ("shuffle_from_outside_of_mask", "__shfl_sync .* reads lane 16, which takes no part"),
        ("shuffle_from_missing_lane", r"__shfl_xor_sync .* reads lane \d+, which takes no part"),
        ("divergent_barrier", "divergent barrier: .*__syncthreads"),
        ("barriers_at_two_sites", r"divergent barrier: __syncthreads .*\d+ threads wait in __syncthreads"),
        ("deadlock", r"(?s)deadlock: in block \(0, 0, 0\) .*__syncthreads at .*__syncwarp\(0xffffffff\) at"),
        ("block_too_large", "a block of 1025 x 1 x 1 threads"),
        ("empty_grid", "a grid of 0 x 1 x 1 blocks"),
    ],
)
def test_what_cuda_leaves_undefined_ends_the_process(either, order, fault, message):
    done = run(either, fault, order)
    assert done.returncode == ABORTED, done.stderr
    assert re.search(message, done.stderr), done.stderr
    # The places that a message names are the calls in the kernel, not something inside the shim.
    lines = SOURCE.read_text().splitlines()
    for name, line in re.findall(r"(__\w+)(?:\(\w+\))? at \S*selftest\.cpp:(\d+)", done.stderr):
        assert f"{name}(" in lines[int(line) - 1]


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("write_past_shared", "AddressSanitizer: heap-buffer-overflow"),
        ("index_past_shared", r"index 63 out of bounds for type 'int \[63\]'"),
        ("read_past_global", "AddressSanitizer: heap-buffer-overflow"),
        ("read_past_local", "AddressSanitizer: stack-buffer-overflow"),
        ("use_shared_after_block", "AddressSanitizer: heap-use-after-free"),
        ("signed_overflow", "signed integer overflow"),
        ("misaligned_load", "misaligned address .* which requires 16 byte alignment"),
    ],
)
def test_the_sanitizers_find_bad_accesses(sanitized, order, fault, report):
    done = run(sanitized, fault, order)
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


def test_plain_shared_declarations_are_refused(tmp_path):
    kernel = tmp_path / "kernel.cpp"
    kernel.write_text("__global__ void kernel() { __shared__ int tile[32]; tile[0] = 1; }\n")
    done = compile_with("-fsyntax-only", kernel)
    assert done.returncode != 0
    assert "declare shared memory with NUMGUARD_SHARED" in done.stderr
