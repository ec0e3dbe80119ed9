"""The CPU kernels where their fast paths end: bounds of single precision, ends of blocks and pages, machine code."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_stats import assert_records, each_dtype

import hallo_numguard as ng
from hallo_numguard.ops.backends import reference
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.native_extension import extension

from backends import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE, reason="the extension was not built")

WHOLE_CALL = 1 << 16  # elements that one call of a kernel reads
BOUNDS = (2.0**59, 2.0**60, 2.0**-41, 2.0**-50)  # beyond them, another way to add up squares begins
WIDE_RANGE = [torch.float32, torch.bfloat16]


def assert_like_the_oracle(flat: torch.Tensor, backend: str) -> None:
    oracle = ng.StatsTable(reference.tensor_stats(flat, None, detail=True), detail=True)
    assert_records(ng.tensor_stats(flat, detail=True), oracle.to_host(), backend)
    assert torch.equal(ng.tensor_stats(flat).packed[:, 5:], ng.tensor_stats(flat, detail=True).packed[:, 5:])


# Bounds


@pytest.mark.parametrize("side", ["below", "at", "above"])
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"2^{math.log2(bound):.0f}")
@pytest.mark.parametrize("dtype", WIDE_RANGE, ids=["float32", "bfloat16"])
def test_both_sides_of_every_bound(each_native: str, dtype: torch.dtype, bound: float, side: str) -> None:
    """All elements there, whose squares add up to the most; and one of them above many whose squares vanish."""
    ulp = bound * 2.0 ** -FORMATS[dtype].mantissa
    value = {"below": bound - ulp / 2, "at": bound, "above": bound + ulp}[side]
    all_there = torch.full((WHOLE_CALL,), value, dtype=dtype)
    one_there = torch.full((WHOLE_CALL,), value * 2.0**-26, dtype=dtype)
    one_there[WHOLE_CALL // 3] = value
    for values in (all_there, -all_there, one_there):
        assert_like_the_oracle(values, each_native)


@pytest.mark.parametrize("dtype", WIDE_RANGE, ids=["float32", "bfloat16"])
def test_small_blocks_among_large_ones(each_native: str, dtype: torch.dtype) -> None:
    values = torch.randn(WHOLE_CALL, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[:20_000] *= 1e-30
    values[30_000:50_000] *= 1e25
    values[60_000:] *= 1e-43
    assert_like_the_oracle(values, each_native)


@pytest.mark.parametrize("stride", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_roundings_of_one_direction_in_every_lane(
    each_native: str, dtype: torch.dtype, depth: int, stride: int
) -> None:
    """The first square of each block is so large that all others of its lane are rounded, the same way each."""
    mantissa = FORMATS[dtype].mantissa
    for factor in (1 + 2.0**-mantissa, 1 - 2.0 ** -(mantissa + 1)) if mantissa < 20 else (1 + 2.0**-20, 1 - 2.0**-20):
        values = torch.full((depth * stride * 13 + 5,), 2.0**-12 * factor).to(dtype)
        for begin in range(0, len(values), depth * stride):
            values[begin : begin + stride] = 1.0
        assert_like_the_oracle(values, each_native)


# Groups of blocks


@each_dtype
def test_single_bad_elements_and_runs_of_them_far_into_a_segment(each_native: str, dtype: torch.dtype) -> None:
    values = torch.randn(50_003, generator=torch.Generator().manual_seed(2)).to(dtype)
    bad = [0, 511, 512, 3071, 3072, 6143, 6144, 12_287, 12_288, 24_575, 24_576, 49_999, 50_002]
    for places in (*([place] for place in bad), bad, range(0, 50_003, 1000), range(20_000, 32_000, 3)):
        planted = values.clone()
        planted[torch.tensor(list(places))] = math.nan
        assert_like_the_oracle(planted, each_native)


# Streams


STREAMED = 33 << 20  # bytes from which on a call reads several places of memory in turns


@each_dtype
def test_places_of_memory_read_in_turns_give_the_bits_of_one(each_native: str, dtype: torch.dtype) -> None:
    """Whole, the buffer is read in turns; each of its segments alone is too small for that."""
    count = STREAMED // dtype.itemsize
    values = torch.randn(99_991, generator=torch.Generator().manual_seed(3)).to(dtype)
    flat = torch.empty(count, dtype=dtype)
    for part in flat.split(len(values)):
        part.copy_(values[: len(part)])
    flat[count // 2 : count // 2 + 70_000] = 1e-26
    flat[torch.tensor([5, 100_000, 100_001, count // 3, count - 1])] = torch.tensor(math.nan).to(dtype)
    ends = [1, 1, 2, 65_539, 65_540, 65_600, 131_136, count // 5, count // 4 + 3, count // 2, count // 2 + 9, count]
    offsets = sorted({*ends, *range(count // 3, count // 3 + 3000, 37)})
    whole = ng.tensor_stats(flat, offsets).packed
    alone = [ng.tensor_stats(flat[begin:end]).packed for begin, end in itertools.pairwise(offsets)]
    assert torch.equal(whole, torch.cat(alone))


# Pages


@pytest.fixture(scope="module")
def page_between_guards() -> Iterator[torch.Tensor]:
    """A page of memory with pages before and behind that end the process when they are read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    guards = (whole.data_ptr(), whole.data_ptr() + 2 * page)
    for guard in guards:
        assert protect(guard, page, 0) == 0
    yield whole[page : 2 * page]
    for guard in guards:
        assert protect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@each_dtype
def test_nothing_is_read_beyond_the_pages_of_a_segment(
    each_native: str, dtype: torch.dtype, page_between_guards: torch.Tensor
) -> None:
    page = page_between_guards.view(dtype)
    page.fill_(2.0)
    for size in (*range(70), 127, 128, 129, 255, 257, len(page) - 1, len(page)):
        for segment in (page[:size], page[len(page) - size :]):
            (record,) = ng.tensor_stats(segment, detail=True).to_host()
            assert (record.nonfinite, record.zeros, record.sumsq) == (0, 0, 4.0 * size)


# Machine code

SQUARES = re.compile(r"vfmadd\d+p[sd] |vdpbf16ps ")
ONE_STRIDE = 4  # the fewest of them in the loop of a block
INSTRUCTIONS = 8  # at most, for each of them; a loop around it has more
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")
NOT_GUARDED = re.compile(r"rescan|::\w+, true[,>]")  # the exact pass, and those that count zeros


def loops_of_blocks(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """Function and instructions of each innermost loop over the strides of a block, without detail."""
    for function in re.split(r"\n\n", disassembly):
        name = function.partition("\n")[0]
        code = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", function, re.MULTILINE)
        if "numguard::cpu" not in name or re.search(NOT_GUARDED, name):
            continue
        place = {address: index for index, (address, _) in enumerate(code)}
        jumps = [
            (place.get(match[1], len(code)), index)
            for index, (_, text) in enumerate(code)
            if (match := JUMP.match(text))
        ]
        spans = [(begin, end) for begin, end in jumps if begin <= end]
        for begin, end in spans:
            if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in spans):
                body = [text for _, text in code[begin : end + 1]]
                squares = sum(SQUARES.match(text) is not None for text in body)
                if squares >= ONE_STRIDE and len(body) <= INSTRUCTIONS * squares:
                    yield name, body


def test_the_loops_over_a_block_keep_everything_in_registers() -> None:
    """A sum on the stack costs a tenth of the speed, and which compiler puts it there is seen nowhere else."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump, of binutils")
    module = extension()
    assert module is not None
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(Path(str(module.__file__)))]
    found = list(loops_of_blocks(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    if "native-avx2" in NATIVE:
        for lanes in ("Float32", "Float16", "BFloat16", "Float64", "Float8E4M3FN", "Float8E5M2"):
            assert any(f"::{lanes}, false" in name for name, _ in found), f"no loop of {lanes} was found"
    for name, body in found:
        spilled = [text for text in body if "(%rsp" in text or "(%rbp" in text]
        assert not spilled, f"{name}: {spilled}"
