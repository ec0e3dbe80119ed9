"""The shim that runs CUDA kernels on the CPU: planted faults are found in every order, with and without sanitizers.

That right kernels give the right results, and that every barrier is missed, test_cuda_kernels.py proves with the real
ones.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from shim_build import ORDERS, SANITIZERS, SHIM, build, compile_with, need_sanitizers, requirements

SOURCE = SHIM / "selftest.cpp"
ABORTED, WRONG = -6, 1

pytestmark = requirements


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain") / "selftest", "-g", SOURCE)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    need_sanitizers(folder)
    return build(folder / "selftest", "-g", *SANITIZERS, SOURCE)


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


def test_shared_memory_is_poisoned_before_every_block(either, order):
    done = run(either, "shared_contents", order)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
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
        ("divergent_branches", r"divergent warp: .*but lane \d+ waits in __shfl_xor_sync\(0xffffffff\)"),
        ("divergent_masks", r"divergent warp: __shfl_xor_sync\(0x\w+\) .*waits in __shfl_xor_sync\(0x\w+\)"),
        ("shuffle_from_outside_of_mask", r"__shfl_xor_sync .* reads lane \d+, which takes no part"),
        ("barriers_at_two_sites", r"divergent barrier: __syncthreads .*\d+ threads wait in __syncthreads"),
        ("deadlock", r"(?s)deadlock: in block 0 .*__syncthreads at .*__shfl_xor_sync\(0xffffffff\) at"),
        ("block_too_large", "a block of 1025 threads"),
        ("empty_grid", "a grid of 0 blocks"),
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
        ("read_past_local", "AddressSanitizer: stack-buffer-overflow"),
        ("use_shared_after_block", "AddressSanitizer: heap-use-after-free"),
        ("signed_overflow", "signed integer overflow"),
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
