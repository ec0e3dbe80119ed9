"""What only a GPU can show. On a machine with one: `pytest -m gpu`.

Everything else about the GPU kernels is proved without: test_cuda_kernels.py, test_gpu_launch.py, and
tests/tools/test_check_gpu_kernels.py.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from test_stats import assert_records, normal

import hallo_numguard as ng
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cuda, triton
from hallo_numguard.ops.formats import FORMATS

from backends import forced_backend
from cases import CASES, Case, definition, expected_of, flat_of
from gpu import NEEDS_GPU, host_sync_is_an_error

BACKENDS = {"triton": triton, "native": cuda}


pytestmark = NEEDS_GPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = BACKENDS[request.param].unavailable("cuda")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with forced_backend(request.param) as name:
        yield name


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call launches, and of its copies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(backend: str, case: Case) -> None:
    flat = flat_of(case).cuda()
    table = ng.tensor_stats(flat, case.offsets, detail=True)
    assert table.packed.device == flat.device
    assert_records(table, list(expected_of(case)), "cuda")
    listed = [flat[begin:end] for begin, end in itertools.pairwise(case.offsets)]
    assert_records(ng.multi_tensor_stats(listed, detail=True), list(expected_of(case)), "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_backends_give_the_same_bits(case: Case) -> None:
    for name, module in BACKENDS.items():
        if module.unavailable("cuda") is not None:
            pytest.skip(f"{name}: {module.unavailable('cuda')}")
    flat, layout = flat_of(case).cuda(), ng.Layout(case.offsets)
    first, second = (module.tensor_stats(flat, layout, True) for module in BACKENDS.values())
    assert torch.equal(first, second)


def test_the_same_bits_every_time(backend: str) -> None:
    flat = torch.randn(50_000_000, device="cuda")
    layout = ng.Layout([0, 7, 30_000_001, 50_000_000])
    first = ng.tensor_stats(flat, layout).packed.clone()
    for _ in range(20):
        assert torch.equal(ng.tensor_stats(flat, layout).packed, first)


def test_a_list_of_every_dtype_and_length(backend: str) -> None:
    for count in (1, 480, 481, 5000):
        values = [normal(index % 97, dtype=list(FORMATS)[index % 6], seed=index) for index in range(count)]
        values.append(normal(100_000))
        tensors = [value.cuda() for value in values]
        expected = [definition(value) for value in values]
        assert_records(ng.multi_tensor_stats(tensors, detail=True), expected, "cuda")


def test_more_elements_than_an_int32_counts(backend: str) -> None:
    count = (1 << 31) + 12345
    if torch.cuda.mem_get_info()[0] < 2 * count:
        pytest.skip("needs 4 GiB of free GPU memory")
    flat = torch.full((count,), 0.5, dtype=torch.float8_e5m2, device="cuda")
    flat.view(torch.uint8)[-2] = 0x7F
    table = ng.tensor_stats(flat, ng.Layout([1, count - 5, count]))
    (first, second) = table.to_host()
    assert (first.nonfinite, second.nan, second.first_nonfinite) == (0, 1, 3)
    assert first.sumsq == (count - 6) * 0.25


def test_no_host_sync(backend: str) -> None:
    flat, layout = torch.randn(1_000_000, device="cuda"), ng.Layout([0, 10, 1_000_000])
    short = [torch.randn(100, device="cuda") for _ in range(10)]
    long = [torch.randn(100, device="cuda") for _ in range(1000)]
    loss = torch.ones((), device="cuda")
    recorder = Recorder(length=8, names=["a", "b"], limit=None)

    def step() -> None:
        table = ng.tensor_stats(flat, layout)
        table.total_norm(), table.found_inf(), table.norm()
        recorder.begin(0, 1.0, ScannedPieces(table, [Piece(0, 0), Piece(1, 0)]), loss)
        recorder.end(applied=True)
        ng.multi_tensor_stats(short)
        ng.multi_tensor_stats(long)

    step()
    with host_sync_is_an_error():
        for _ in range(20):
            step()
        recorder.fresh(wait=False)
    assert len(recorder.read()) == 8


def test_launches_and_copies(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # the fixture asks for it
    flat, layout = torch.randn(1_000_000, device="cuda"), ng.Layout([0, 10, 1_000_000])
    long = [torch.randn(100, device="cuda") for _ in range(1000)]
    ng.tensor_stats(flat, layout), ng.multi_tensor_stats(long)
    assert len(kernels_of(lambda: ng.tensor_stats(flat, layout))) == 2
    found = kernels_of(lambda: ng.multi_tensor_stats(long))
    assert sum("chunk_kernel" in name for name in found) == 1
    assert sum("Memcpy" in name for name in found) == 1
    assert len(found) == 2


def test_a_graph_captures_it_and_every_replay_reads_the_memory_anew(backend: str) -> None:
    flat, layout = torch.randn(100_000, device="cuda"), ng.Layout([0, 10, 100_000])
    long = [torch.randn(100, device="cuda") for _ in range(1000)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ng.tensor_stats(flat, layout), ng.multi_tensor_stats(long)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table, of_list = ng.tensor_stats(flat, layout), ng.multi_tensor_stats(long)
        found = table.found_inf()
    others = [ng.multi_tensor_stats([torch.ones(7, device="cuda") for _ in range(1000)]) for _ in range(5)]
    for where in (5, 99_999):
        flat[where] = torch.nan
        long[where % 1000][3] = torch.inf
        graph.replay()
        torch.cuda.synchronize()
        expected = [definition(flat[:10].cpu()), definition(flat[10:].cpu())]
        assert [record.nan for record in table.to_host()] == [record.nan for record in expected]
        assert found.item() == 1.0
        assert of_list.to_host()[where % 1000].first_nonfinite == 3
    assert all(other.found_inf().item() == 0.0 for other in others)


def test_it_runs_on_the_callers_stream(backend: str) -> None:
    flat, layout = torch.zeros(10_000_000, device="cuda"), ng.Layout([0, 5, 10_000_000])
    ng.tensor_stats(flat, layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        flat[9] = torch.nan
        table = ng.tensor_stats(flat, layout)
    side.synchronize()
    assert table.to_host()[1].first_nonfinite == 4


def test_two_gpus(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = [normal(1000, seed=seed) for seed in range(6)]
    values[3][5] = torch.nan
    tensors = [value.to(f"cuda:{index % 2}") for index, value in enumerate(values)]
    assert_records(ng.multi_tensor_stats(tensors, detail=True), [definition(value) for value in values], "cuda")
    with torch.cuda.device(0):
        table = ng.tensor_stats(tensors[3], detail=True)
    assert table.packed.device == torch.device("cuda:1")
    assert_records(table, [definition(values[3])], "cuda")


def test_threads(backend: str) -> None:
    results: dict[int, list[ng.StatsTable]] = {}
    values = {number: [normal(500, seed=number * 1000 + index) for index in range(700)] for number in range(4)}

    def run(number: int) -> None:
        with torch.cuda.device(number % torch.cuda.device_count()), torch.cuda.stream(torch.cuda.Stream()):
            tensors = [value.cuda() for value in values[number]]
            results[number] = [ng.multi_tensor_stats(tensors, detail=True) for _ in range(10)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, tables in results.items():
        for table in tables:
            assert_records(table, [definition(value) for value in values[number]], "cuda")


def test_compile_takes_the_operator_as_one_piece(backend: str) -> None:
    flat, layout = torch.randn(1000, device="cuda"), ng.Layout([0, 10, 1000])

    def norms(values: torch.Tensor) -> torch.Tensor:
        return ng.tensor_stats(values * 2, layout.offsets).norm()

    assert torch.allclose(torch.compile(norms, fullgraph=True)(flat), norms(flat))


def test_the_fastest_backend_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    dispatch.backend_for.cache_clear()
    chosen = dispatch.backend_for("cuda")
    dispatch.backend_for.cache_clear()
    assert chosen is not dispatch.backend("reference"), dispatch.explain("cuda")
