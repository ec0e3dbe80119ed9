"""The CUDA kernels themselves, run on the CPU by the shim: the same bits in every order, and the same as Triton's."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stats import assert_records, name_of

import hallo_numguard as ng
from hallo_numguard.core.records import Record
from hallo_numguard.ops.backends import triton
from hallo_numguard.ops.backends.chunks import CHUNK, Chunks, chunks_of, chunks_of_layout
from hallo_numguard.ops.formats import FORMATS

import shim_build
from backends import forced_backend
from cases import CASES, Case, definition, expected_of, flat_of, from_bits
from paths import ROOT, TESTS

pytestmark = [*shim_build.requirements, pytest.mark.slow]

CPU = torch.device("cpu")
RECORD_BYTES = 64
SOURCE = Path("csrc", "cuda", "kernels.cuh")
INLINE_CAPACITY = int(re.findall(r"kCapacity = (\d+);", (ROOT / SOURCE).read_text())[0])
WINDOW = {1: 2048, 2: 2048, 4: 1024, 8: 512}  # elements that a block of threads takes at a time, by their size


# Calls of the kernels


@dataclass(frozen=True)
class Call:
    """What a launcher gives to the kernels.

    Attributes:
        memories: Contiguous tensors, beyond which the kernels must not look.
        starts: Of each segment: the memory it is in, and how many bytes from its begin.
        chunks: The tables.
        expected: By the definition.
    """

    memories: Sequence[torch.Tensor]
    starts: Sequence[tuple[int, int]]
    chunks: Chunks
    expected: Sequence[Record]

    def packed(self, detail: bool) -> bytes:
        """As kernel_runner.py reads it."""
        chunks = self.chunks
        return pickle.dumps(
            {
                "detail": detail,
                "memories": [(memory.data_ptr() % 64, _bytes(memory)) for memory in self.memories],
                "starts": self.starts,
                "launches": [(FORMATS[dtype].code, first, count) for dtype, first, count in chunks.launches],
                "chunks": _bytes(chunks.table),
                "splits": _bytes(chunks.splits),
                "n_splits": len(chunks.splits),
                "rows": chunks.rows,
                "segments": chunks.segments,
            }
        )

    def triton_bits(self, detail: bool) -> bytes:
        """The records that the Triton kernels write."""
        addresses = [self.memories[memory].data_ptr() + start for memory, start in self.starts]
        return _bytes(triton._launch(0, torch.tensor(addresses), self.chunks, detail))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def in_bucket(flat: torch.Tensor, offsets: Sequence[int], expected: Sequence[Record] | None = None) -> Call:
    chunks, starts = chunks_of_layout(ng.Layout(offsets), flat.dtype, CPU)
    if expected is None:
        expected = [definition(flat[begin:end]) for begin, end in itertools.pairwise(offsets)]
    return Call([flat], [(0, start) for start in starts.tolist()], chunks, expected)


def in_list(tensors: Sequence[torch.Tensor]) -> Call:
    sizes = torch.tensor([tensor.numel() for tensor in tensors])
    codes = torch.tensor([FORMATS[tensor.dtype].code for tensor in tensors])
    starts = [(index, 0) for index in range(len(tensors))]
    return Call(tensors, starts, chunks_of(sizes, codes, CPU), [definition(tensor) for tensor in tensors])


def placed(values: torch.Tensor, alignment: int) -> torch.Tensor:
    """A copy at an address that is `alignment` modulo 64, which the size of an element must divide."""
    item = values.element_size()
    memory = torch.zeros(values.numel() + 128 // item, dtype=values.dtype)
    first = (alignment - memory.data_ptr()) % 64 // item
    moved = memory[first : first + values.numel()]
    return moved.copy_(values)


def spread(dtype: torch.dtype, size: int, seed: int) -> torch.Tensor:
    """Numbers whose squares differ enough for every order of adding them to round to something else."""
    generator = torch.Generator().manual_seed(seed)
    values, exponents = torch.randn(2, size, generator=generator)
    return (values * (exponents * (1 if dtype.itemsize == 1 else 4)).exp2()).to(dtype)


def raw_bits(dtype: torch.dtype, size: int, seed: int) -> torch.Tensor:
    """Any bits at all, or those of finite numbers; from one segment to the next, which is which changes."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
    if seed % 2:
        bits &= ~(1 << (FORMATS[dtype].mantissa + FORMATS[dtype].exponent - 1))
    return from_bits(bits, dtype)


def at_every_alignment(dtype: torch.dtype) -> Call:
    """Head, interior and tail of all lengths, at the end of the memory that the kernels may read."""
    item = dtype.itemsize
    vector, window = 32 // item, WINDOW[item]
    places = itertools.product(range(0, 32, item), (vector - 1, 2 * vector + 1, window + vector + 3))
    return in_list([placed(spread(dtype, size, seed), at) for seed, (at, size) in enumerate(places)])


def of_several_chunks(dtype: torch.dtype) -> Call:
    """Segments around the size of a chunk, of which the first begins anywhere."""
    offsets = list(itertools.accumulate((5, CHUNK - 1, CHUNK, 2 * CHUNK + 5, CHUNK + 1)))
    flat = spread(dtype, offsets[-1], seed=1)
    flat[offsets[3] - 3] = math.nan  # in the last chunk, of five elements
    flat[offsets[3] - 1] = -math.inf
    flat[offsets[3] :] = math.nan
    return in_bucket(flat, offsets)


def of_random_bits(dtype: torch.dtype) -> Call:
    tensors = []
    generator = torch.Generator().manual_seed(7)
    for seed in range(12):
        longest = 4 * WINDOW[dtype.itemsize] if seed < 8 else 100
        size, place = torch.randint(1, longest, (2,), generator=generator).tolist()
        tensors.append(placed(raw_bits(dtype, size, seed), place * dtype.itemsize % 64))
    return in_list(tensors)


def at_the_limits(dtype: torch.dtype) -> Call:
    """Segments whose largest magnitude is the first, or last, whose squares single precision holds, or one beside."""
    tensors = []
    for seed, limit in enumerate((2.0**-50, 2.0**60)):
        at_limit = torch.tensor([limit], dtype=dtype).view(FORMATS[dtype].bits)
        for peak in (from_bits(at_limit - 1, dtype), from_bits(at_limit, dtype)):
            fractions = torch.rand(10_000, generator=torch.Generator().manual_seed(seed))
            tensors.append(torch.cat([(fractions.double() * peak.double()).to(dtype), peak]))
    return in_list(tensors)


def of_case(case: Case) -> Call:
    return in_bucket(flat_of(case), case.offsets, expected_of(case))


def of_mixed_dtypes(count: int) -> Call:
    """Small tensors of dtypes that take turns, some empty, as a model without a bucket has them."""
    tensors = []
    for index in range(count):
        dtype = list(FORMATS)[index % len(FORMATS)]
        tensors.append(placed(spread(dtype, index % 23 * (index % 5), index), index * dtype.itemsize % 64))
    return in_list(tensors)


def of_more_chunks_than_threads() -> Call:
    """A segment with more chunks than a block has threads. Not of a size that it would take: they are all its begin."""
    count = 140
    flat = spread(torch.float32, count, seed=3)
    flat[-10:] = torch.tensor([math.nan, -math.inf] * 5)
    flat[:7] = 0.0
    table = torch.tensor([[0, 0, length, 1 + length] for length in range(count)], dtype=torch.int32)
    splits = torch.tensor([[0, 1, 1 + count]], dtype=torch.int32)
    parts = [definition(flat[:length]) for length in range(count)]
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("nan", "neg_inf", "sumsq", "zeros")}
    chunks = Chunks(table, splits, ((torch.float32, 0, count),), segments=1, rows=1 + count)
    return Call([flat], [(0, 0)], chunks, [replace(parts[-1], **sums)])


FROM_CASES = {str(case): functools.partial(of_case, case) for case in CASES}
BY_DTYPE = {
    f"{make.__name__}-{name_of(dtype)}": functools.partial(make, dtype)
    for make in (at_every_alignment, of_several_chunks, of_random_bits)
    for dtype in FORMATS
}
OTHERS = {
    "at_the_limits-float32": functools.partial(at_the_limits, torch.float32),
    "at_the_limits-bfloat16": functools.partial(at_the_limits, torch.bfloat16),
    "of_mixed_dtypes": functools.partial(of_mixed_dtypes, 120),
    "of_more_chunks_than_threads": of_more_chunks_than_threads,
}
AROUND_CAPACITY = {
    "of_the_most_addresses_inline": functools.partial(of_mixed_dtypes, INLINE_CAPACITY),
    "of_too_many_addresses_inline": functools.partial(of_mixed_dtypes, INLINE_CAPACITY + 1),
}
CALLS = {**FROM_CASES, **BY_DTYPE, **OTHERS, **AROUND_CAPACITY}


@functools.cache
def call_of(name: str) -> Call:
    return CALLS[name]()


# Runs


@dataclass(frozen=True)
class Job:
    """A call, in a process that runs many."""

    name: str
    detail: bool = True

    def __str__(self) -> str:
        return self.name if self.detail else f"{self.name} without detail"


@dataclass(frozen=True)
class Batch:
    """Jobs, and the file that has their calls."""

    jobs: Sequence[Job]
    calls: Path

    @classmethod
    def written(cls, calls: Path, jobs: Sequence[Job]) -> Batch:
        calls.write_bytes(b"".join(call_of(job.name).packed(job.detail) for job in jobs))
        return cls(jobs, calls)


class Stopped(AssertionError):
    """The runner did not come to its end."""


def run(library: Path, order: str, batch: Batch) -> dict[Job, bytes]:
    """Returns the records of each job."""
    records = library.with_suffix(f".{order}")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    if "sanitized" in library.stem:
        environment |= shim_build.sanitizer_environment()
    command = [sys.executable, TESTS / "support" / "kernel_runner.py", library, order, batch.calls, records]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rest = records.read_bytes() if records.exists() else b""
    result = {}
    for job in batch.jobs:
        size = RECORD_BYTES * call_of(job.name).chunks.segments
        if len(rest) < size:
            raise Stopped(f"{job}, in {order} order: exit code {done.returncode}: {done.stderr}")
        result[job], rest = rest[:size], rest[size:]
    assert (done.returncode, done.stderr, rest) == (0, "", b"")
    return result


# In which order fibers meet, and what they read, does not depend on the values. So most of the cases, which differ in
# their values only, run once with each way to load, and without the sanitizers, which take twice as long.
FEW = [name for name in CALLS if name in BY_DTYPE or name in OTHERS or name.endswith("ragged-normal-mixed")]
JOBS = {
    "few": [Job(name) for name in FEW],
    "most": [Job(name) for name in CALLS] + [Job(name, detail=False) for name in FEW],
    "all": [Job(name, detail) for name in CALLS for detail in (True, False)],
}
NARROW, WIDE = "-DNUMGUARD_WIDE_LOADS=0", "-DNUMGUARD_WIDE_LOADS=1"
BUILDS = {
    "narrow": [NARROW],
    "wide": [WIDE],
    "narrow-sanitized": [NARROW, "-g1", *shim_build.SANITIZERS],
    "wide-sanitized": [WIDE, "-g1", *shim_build.SANITIZERS],
}
REFERENCE = ("narrow", "forward")
RUNS = {key: "few" for key in itertools.product(BUILDS, shim_build.ORDERS)}
RUNS |= {REFERENCE: "all", ("wide", "reverse"): "most"}

Bindings = Mapping[bool, Future[Path]]
Runs = Mapping[tuple[str, str], Future[dict[Job, bytes]]]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Waits for compilers and runners, while Triton's interpreter keeps the main thread busy."""
    with ThreadPoolExecutor(max_workers=2) as workers:
        yield workers
        workers.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def bindings(pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """What Python calls the kernels by, without the sanitizers and with them."""
    folder = tmp_path_factory.mktemp("bindings")
    return {
        False: pool.submit(shim_build.build_bindings, folder / "plain.o"),
        True: pool.submit(shim_build.build_bindings, folder / "sanitized.o", *shim_build.SANITIZERS),
    }


def build(folder: Path, name: str, bindings: Bindings, kernels: Path = shim_build.KERNELS) -> Path:
    flags = BUILDS[name]
    own = bindings[shim_build.SANITIZERS[0] in flags].result()
    return shim_build.build_extension(folder / f"{name}.so", own, *flags, kernels=kernels)


@pytest.fixture(scope="module")
def runs(pool: ThreadPoolExecutor, bindings: Bindings, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The records of every build and order."""
    folder = tmp_path_factory.mktemp("kernels")
    batches = {name: Batch.written(folder / f"{name}.calls", jobs) for name, jobs in JOBS.items()}
    results = {}
    for name in BUILDS:
        library = pool.submit(build, folder, name, bindings)
        for order in shim_build.ORDERS:
            results[name, order] = pool.submit(run_when_built, library, order, batches[RUNS[name, order]])
    return results


def run_when_built(library: Future[Path], order: str, batch: Batch) -> dict[Job, bytes]:
    return run(library.result(), order, batch)


@pytest.fixture(scope="module")
def reference(runs: Runs) -> dict[Job, bytes]:
    return runs[REFERENCE].result()


def without_counts(records: bytes) -> bytes:
    words = torch.frombuffer(bytearray(records), dtype=torch.int64).reshape(-1, 8)
    words[:, 3:5] = 0
    return _bytes(words)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_give_what_the_definition_says(reference: dict[Job, bytes], name: str) -> None:
    packed = torch.frombuffer(bytearray(reference[Job(name)]), dtype=torch.int64).reshape(-1, 8)
    assert_records(ng.StatsTable(packed, detail=True), list(call_of(name).expected), "triton")


@pytest.mark.parametrize("name", CALLS)
def test_without_detail_only_the_counts_of_zeros_and_subnormals_are_missing(
    reference: dict[Job, bytes], name: str
) -> None:
    assert reference[Job(name, detail=False)] == without_counts(reference[Job(name)])


# Triton


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton's interpreter, twice as fast.

    It replaces the functions of Triton's language by its own at every call of a device function. Once for each module
    that uses them is enough, as long as no other test runs meanwhile.
    """
    implementation = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
    patch_language = implementation._patch_lang
    patched = {}

    def patch_once(function: Any) -> Any:
        module = function.__globals__["__name__"]
        if module not in patched:
            patched[module] = patch_language(function)
        return implementation._LangPatchScope()

    with forced_backend("triton-interpreted"), pytest.MonkeyPatch.context() as patch:
        if hasattr(implementation, "_LangPatchScope"):  # else another version of Triton, and slow
            patch.setattr(implementation, "_patch_lang", patch_once)
        yield
        for scope in reversed(patched.values()):
            scope.restore()


# The interpreter is slow, so it does not run what others stand for: most calls without detail, for which the test above
# says what the CUDA kernels give, and 25 tiny segments more with planted values, which the ragged ones have as well.
COMPARED = [
    Job(name, detail)
    for name in CALLS
    for detail in (True, False)
    if (detail and name not in AROUND_CAPACITY and "tiny-normal-mixed" not in name)
    or "one_segment" in name
    or "unaligned-subnormal" in name
    or "of_random_bits" in name
]


@pytest.mark.parametrize("job", COMPARED, ids=str)
def test_the_bits_are_those_of_the_triton_kernels(reference: dict[Job, bytes], interpreter: None, job: Job) -> None:
    assert reference[job] == call_of(job.name).triton_bits(job.detail)


# Builds and orders


@pytest.mark.parametrize(("name", "order"), RUNS)
def test_every_build_and_order_gives_the_same_bits(
    runs: Runs, reference: dict[Job, bytes], name: str, order: str
) -> None:
    records = runs[name, order].result()
    assert [str(job) for job in records if records[job] != reference[job]] == []


# Faults, planted in the kernels: that the tests above pass means something only if these are found

BARRIER = "__syncthreads();"
BARRIERS = (ROOT / SOURCE).read_text().count(BARRIER)
ON_FLOAT32 = [Job(name) for name in FEW if "float32" in name or name == "of_more_chunks_than_threads"]
OTHER_BITS = "other bits"
OUT_OF_BOUNDS = "AddressSanitizer: heap-buffer-overflow"

# Name: what must come of it, in which build, and what is replaced in the source by what.
FAULTS = {
    "lanes_that_skip_a_shuffle": (
        "divergent warp: __shfl_xor_sync",
        "narrow",
        ("distance *= 2) value", "distance *= 2) if (threadIdx.x % 2) value"),
    ),
    "lane_outside_of_the_mask": (
        "lane 31 is not in its own mask",
        "narrow",
        ("warp_tree_sum(double value) {", "warp_tree_sum(double value) { constexpr unsigned kAllLanes = ~0u >> 1;"),
    ),
    "barrier_of_some_warps": (
        "divergent barrier",
        "narrow",
        (f"{BARRIER}\n\n  Record*", f"if (warp_id() > 0) {BARRIER}\n\n  Record*"),
    ),
    "tail_that_is_too_long": (
        OUT_OF_BOUNDS,
        "narrow-sanitized",
        ("thread_id() < kVector + tail", "thread_id() <= kVector + tail"),
    ),
    "exact_pass_that_is_too_long": (OTHER_BITS, "narrow", ("if (index >= length)", "if (index > length)")),
    "vectors_that_are_not_aligned": (
        "misaligned address",
        "narrow-sanitized",
        ("kAlignment = 32;", "kAlignment = 8;"),
    ),
    "vectors_of_half_a_sector": (OTHER_BITS, "wide", ("kAlignment = 32;", "kAlignment = 16;")),
    "wide_loads_to_the_lanes_of_narrow_ones": (OTHER_BITS, "wide", ("kAdjacent ? i : i * kThreads", "i * kThreads")),
    "index_of_another_chunk": (OTHER_BITS, "narrow", ("-1 : begin + first", "-1 : begin / 2 + first")),
    "chunks_that_are_left_out": (OTHER_BITS, "narrow", ("row += kThreads", "row += 2 * kThreads")),
    "sums_in_another_order": (
        OTHER_BITS,
        "narrow",
        ("distance = 1; distance < 32; distance *= 2", "distance = 16; distance > 0; distance /= 2"),
    ),
}


def result_of(folder: Path, source: str, build_name: str, bindings: Bindings, reference: dict[Job, bytes]) -> str:
    """What the orders find in kernels with this source: a message, or nothing.

    They are compiled for one dtype only, in a second.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / SOURCE).write_text(source)
    launches = folder / SOURCE.with_name("stats.cu")
    launches.write_text(re.sub(r"case k(?!Float32:).*:\n.*;\n", "", launches.read_text()))
    library = build(folder, build_name, bindings, launches)
    batch = Batch.written(folder / "calls", ON_FLOAT32)
    for order in shim_build.ORDERS:
        try:
            records = run(library, order, batch)
        except Stopped as stopped:
            return str(stopped)
        if any(records[job] != reference[job] for job in batch.jobs):
            return OTHER_BITS
    return ""


@pytest.fixture(scope="module")
def results(
    pool: ThreadPoolExecutor, bindings: Bindings, reference: dict[Job, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Future[str]]:
    """What comes of every fault, of every barrier that is not there, and of the source as it is."""
    source = (ROOT / SOURCE).read_text()
    faulty = {"none": (source, "narrow")}
    for name, (_, build_name, (old, new)) in FAULTS.items():
        assert source.count(old) == 1, f"{name}: the kernels have changed"
        faulty[name] = source.replace(old, new), build_name
    pieces = source.split(BARRIER)
    for index in range(1, len(pieces)):
        faulty[f"no barrier {index}"] = BARRIER.join(pieces[:index]) + BARRIER.join(pieces[index:]), "narrow"
    return {
        name: pool.submit(result_of, tmp_path_factory.mktemp("faults"), text, build_name, bindings, reference)
        for name, (text, build_name) in faulty.items()
    }


def test_no_fault_is_found_in_the_kernels_as_they_are(results: Mapping[str, Future[str]]) -> None:
    assert results["none"].result() == ""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(results: Mapping[str, Future[str]], name: str) -> None:
    assert re.search(FAULTS[name][0], results[name].result())


@pytest.mark.parametrize("barrier", range(1, BARRIERS + 1))
def test_every_barrier_is_missed(results: Mapping[str, Future[str]], barrier: int) -> None:
    assert results[f"no barrier {barrier}"].result()
