"""Triton kernels with a fault each, compiled for one GPU and read as the real ones are. Prints what is found, as JSON.

In a process of its own, because tests elsewhere have Triton's interpreter on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[2] / "tools"))

import torch
import triton
import triton.language as tl
from gpu_compilers import CompilingDriver, read_cubin
from kernel_checks import Variant
from sass import UnknownCode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ARCH = 100
N = 1_000_003  # a multiple of nothing: else Triton compiles for that


@triton.jit
def clean(data, out, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in tl.range(0, n // BLOCK * BLOCK, BLOCK, loop_unroll_factor=4):
        value = tl.load(data + offset + lane)
        total += value * value
    tl.store(out + lane, total)


@triton.jit
def masked(data, out, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in tl.range(0, n, BLOCK, loop_unroll_factor=4):
        value = tl.load(data + offset + lane, mask=offset + lane < n, other=0)
        total += value * value
    tl.store(out + lane, total)


@triton.jit
def summed_in_the_loop(data, out, n, BLOCK: tl.constexpr):
    total = 0.0
    for offset in tl.range(0, n // BLOCK * BLOCK, BLOCK, loop_unroll_factor=4):
        total += tl.sum(tl.load(data + offset + tl.arange(0, BLOCK)))
    tl.store(out, total)


@triton.jit
def in_double(data, out, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for offset in tl.range(0, n // BLOCK * BLOCK, BLOCK, loop_unroll_factor=4):
        value = tl.load(data + offset + lane).to(tl.float64)
        total += value * value
    tl.store(out + lane, total.to(tl.float32))


CASES = {
    "clean": (clean, {"BLOCK": 1024}),
    "spills": (clean, {"BLOCK": 8192, "maxnreg": 32}),
    "takes too many registers": (clean, {"BLOCK": 8192}),
    "loads narrow": (masked, {"BLOCK": 1024}),
    "waits in the loop": (summed_in_the_loop, {"BLOCK": 1024}),
    "computes in double": (in_double, {"BLOCK": 1024}),
}


def main() -> None:
    """Compiles, judges, prints."""
    driver.set_active(CompilingDriver(GPUTarget("cuda", ARCH, 32)))
    found = {}
    data = torch.zeros(16)
    for name, (kernel, options) in CASES.items():
        compiled = kernel.warmup(data, data, N, grid=(1,), num_warps=4, enable_fp_fusion=False, **options)
        try:
            (figures,) = read_cubin(compiled.asm["cubin"], ARCH, lambda _: Variant("triton", "chunk", "float32"))
            found[name] = figures.violations
        except UnknownCode as error:
            found[name] = [str(error)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
