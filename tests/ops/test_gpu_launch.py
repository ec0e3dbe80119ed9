"""The way of a call to a GPU, on GPUs that are none: what is launched where, what is copied, and no host sync.

Everything of ours is real, down to the CUDA source, which the shim runs; fake_gpu.py has torch's side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from test_stats import assert_records, normal

import hallo_numguard as ng
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.ops import device, dispatch
from hallo_numguard.ops.backends import cuda, reference, triton
from hallo_numguard.ops.backends.chunks import CHUNK, Chunks
from hallo_numguard.ops.formats import FORMATS

import fake_gpu
import shim_build
from cases import CASES, Case, definition, expected_of, flat_of
from fake_gpu import FakeGpus, HostSync, on_gpu, reveal
from paths import TESTS

pytestmark = [*shim_build.requirements, pytest.mark.slow]

CAPACITY = 480


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return fake_gpu.build_extension(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def gpus(extension) -> Iterator[FakeGpus]:
    with fake_gpu.fake_gpus(*extension, backend="native") as gpus:
        device._local.__dict__.clear()
        yield gpus


def table_on_host(table: ng.StatsTable) -> ng.StatsTable:
    return ng.StatsTable(reveal(table.packed), table.detail)


def warm(call):
    """The first call of a kind makes its tables; every later one must not wait."""
    with fake_gpu.setting_up():
        call()
    return call()


# The fake itself


def test_a_fake_tensor_refuses_whatever_waits(gpus: FakeGpus) -> None:
    tensor = on_gpu(normal(3))
    assert tensor.device == torch.device("cuda:0")
    assert (tensor + 1).device == torch.device("cuda:0")
    waits = [
        tensor.tolist,
        tensor.cpu,
        lambda: tensor.sum().item(),
        lambda: bool(tensor.any()),
        lambda: tensor[[0, 2]],
        lambda: tensor.to("cpu"),
        lambda: tensor.to("cpu", non_blocking=True),
        lambda: torch.zeros(3).to(tensor.device),
        lambda: torch.tensor([1.0], device="cuda:0"),
        lambda: torch.empty(3).copy_(tensor, non_blocking=True),
        torch.cuda.synchronize,
        torch.cuda.Event().synchronize,
    ]
    for wait in waits:
        with pytest.raises(HostSync):
            wait()
    pinned = torch.empty(3, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    assert torch.equal(pinned, reveal(tensor))


def test_a_copy_that_waits_would_be_found(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: the launcher with a planted wait."""
    flat, layout = on_gpu(normal(1000)), ng.Layout([0, 10, 1000])
    warm(lambda: ng.tensor_stats(flat, layout))
    real = cuda._scan_table
    monkeypatch.setattr(cuda, "_scan_table", lambda *args: real(*args).cpu())
    with pytest.raises(HostSync):
        ng.tensor_stats(flat, layout)


# Values, through all of it


@pytest.mark.parametrize("case", [case for case in CASES if case.layout != "tiny"], ids=str)
def test_values(gpus: FakeGpus, case: Case) -> None:
    flat, layout = on_gpu(flat_of(case)), ng.Layout(case.offsets)
    table = warm(lambda: ng.tensor_stats(flat, layout, detail=True))
    assert table.packed.device == torch.device("cuda:0")
    assert_records(table_on_host(table), list(expected_of(case)), "cuda")


# Launches


def test_a_bucket_takes_two_launches_and_its_table_stays_on_the_device(gpus: FakeGpus) -> None:
    flat, layout = on_gpu(normal(100_000)), ng.Layout([0, 10, 90_000, 100_000])
    table = warm(lambda: ng.tensor_stats(flat, layout))
    gpus.take_launches()
    table = ng.tensor_stats(flat, layout)
    assert [blocks for _, _, blocks in gpus.take_launches()] == [5, 1], "a block a chunk, then one a split segment"
    for result in (table.total_norm(), table.found_inf(), table.norm(), table.nonfinite, table.absmax):
        assert result.device == torch.device("cuda:0")
    assert reveal(table.found_inf()).item() == 0.0
    assert reveal(table.total_norm()).item() == pytest.approx(reveal(flat).double().norm().item(), rel=5e-6)


def test_segments_of_one_chunk_take_one_launch(gpus: FakeGpus) -> None:
    flat, layout = on_gpu(normal(60_000)), ng.Layout([0, 10, 10, 30_000, 60_000])
    warm(lambda: ng.tensor_stats(flat, layout))
    gpus.take_launches()
    ng.tensor_stats(flat, layout)
    assert [blocks for _, _, blocks in gpus.take_launches()] == [4]


@pytest.mark.parametrize("count", [1, 2, CAPACITY, CAPACITY + 1, 1000])
def test_a_list_takes_a_launch_a_dtype_and_one_more_however_long_it_is(gpus: FakeGpus, count: int) -> None:
    sizes = [40_000 if index == 0 else index % 7 for index in range(count)]
    dtypes = [torch.float32, torch.bfloat16]
    values = [normal(size, dtype=dtypes[index % 2]) for index, size in enumerate(sizes)]
    values[-1] = values[-1].clone().fill_(torch.nan)
    tensors = [on_gpu(value) for value in values]
    table = warm(lambda: ng.multi_tensor_stats(tensors, detail=True))
    gpus.take_launches()
    table = ng.multi_tensor_stats(tensors, detail=True)
    assert len(gpus.take_launches()) == len(dtypes[:count]) + 1
    assert_records(table_on_host(table), [definition(value) for value in values], "cuda")


def test_addresses_that_fit_the_arguments_of_a_launch_are_not_copied(gpus: FakeGpus) -> None:
    tensors = [on_gpu(normal(5)) for _ in range(CAPACITY)]
    warm(lambda: ng.multi_tensor_stats(tensors))
    more = [*tensors, on_gpu(normal(5))]
    warm(lambda: ng.multi_tensor_stats(more))
    gpus.runtime.copies_finish = False
    before = len(gpus.runtime.events)
    ng.multi_tensor_stats(tensors)
    assert len(gpus.runtime.events) == before, "a copy leaves an event behind"
    ng.multi_tensor_stats(more)
    assert len(gpus.runtime.events) == before + 1


def test_not_even_the_first_call_waits(gpus: FakeGpus) -> None:
    flat = on_gpu(normal(100_003))
    ng.tensor_stats(flat, ng.Layout([0, 17, 90_001, 100_003]))
    ng.tensor_stats(flat)
    ng.multi_tensor_stats([flat, on_gpu(normal(999_983))])


def test_a_first_call_is_not_captured_into_a_graph(gpus: FakeGpus) -> None:
    flat = on_gpu(normal(100_019))
    gpus.runtime.capturing = True
    with pytest.raises(RuntimeError, match="make such a call before the capture"):
        ng.tensor_stats(flat)


def test_pinned_memory_is_written_again_only_when_its_copy_is_done(gpus: FakeGpus) -> None:
    words = [bytes([number]) * 8 * 600 for number in range(4)]
    home = torch.device("cuda:0")
    gpus.runtime.copies_finish = False
    sent = [device.send(word, home) for word in words]
    assert len(gpus.runtime.events) == 4, "no copy is done: four buffers"
    gpus.runtime.copies_finish = True
    sent += [device.send(word, home) for word in words]
    assert len(gpus.runtime.events) == 4, "all are done: none is needed any more"
    assert [reveal(one).numpy().tobytes() for one in sent] == words * 2
    device.send(bytes(8 * 5000), home)
    assert len(gpus.runtime.events) == 5, "a larger one"


def test_what_a_graph_captures_is_kept_for_its_replays(gpus: FakeGpus) -> None:
    before = len(device._captured)
    gpus.runtime.capturing = True
    first = device.send(bytes(range(8)) * 600, torch.device("cuda:0"))
    second = device.send(bytes(8 * 600), torch.device("cuda:0"))
    assert not gpus.runtime.events, "an event must not be asked while a graph is captured"
    kept = device._captured[before:]
    assert [torch.equal(one, reveal(sent)) for one, sent in zip(kept, (first, second), strict=True)] == [True, True]
    assert kept[0].data_ptr() != kept[1].data_ptr()
    del device._captured[before:]


# Devices, streams and threads


def test_tensors_of_two_gpus_in_one_list(gpus: FakeGpus) -> None:
    values = [normal(50, seed=seed) for seed in range(5)]
    values[3][7] = torch.inf
    tensors = [on_gpu(value, gpu=index % 2) for index, value in enumerate(values)]
    table = warm(lambda: ng.multi_tensor_stats(tensors, detail=True))
    gpus.take_launches()
    table = ng.multi_tensor_stats(tensors, detail=True)
    assert [(index, stream) for index, stream, _ in gpus.take_launches()] == [(0, 10), (1, 11)]
    assert table.packed.device == torch.device("cuda:0")
    assert_records(table_on_host(table), [definition(value) for value in values], "cuda")


def test_one_thread_a_rank_each_with_a_gpu_of_its_own(gpus: FakeGpus) -> None:
    """Their launches go to their own device and stream, and their pinned memory is their own."""
    found: dict[int, ng.StatsTable] = {}
    values = {rank: [normal(100, seed=rank * 1000 + index) for index in range(600)] for rank in (0, 1)}
    layout = ng.Layout([0, 50, 100])

    def run(rank: int) -> None:
        fake_gpu.be_thread(rank + 1)
        tensors = [on_gpu(value, gpu=rank) for value in values[rank]]
        with fake_gpu.Mode():
            for _ in range(3):
                found[rank] = ng.multi_tensor_stats(tensors, detail=True)
                ng.tensor_stats(tensors[0], layout)

    with fake_gpu.setting_up():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {(index, stream) for index, stream, _ in gpus.take_launches()} == {(0, 1010), (1, 2011)}
    for rank, table in found.items():
        assert table.packed.device == torch.device("cuda", rank)
        assert_records(table_on_host(table), [definition(value) for value in values[rank]], "cuda")


def test_the_device_that_was_current_is_current_again(gpus: FakeGpus, extension) -> None:
    flat = on_gpu(normal(10), gpu=1)
    warm(lambda: ng.tensor_stats(flat))
    assert extension[1].current_device() == 0
    assert {index for index, _, _ in gpus.take_launches()} == {1}


def test_a_device_that_is_not_there_is_an_error_with_cudas_words(extension) -> None:
    with pytest.raises(RuntimeError, match="CUDA: make the device current: invalid device"):
        extension[0].scan_inline(99, 0, (0, [], 0, 0), b"", False, 0)
    assert "invalid device" in extension[0].unavailable(99)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_memory_that_a_kernel_cannot_read_as_it_is_is_copied_first(gpus: FakeGpus, dtype: torch.dtype) -> None:
    values = normal(30, 40, dtype=dtype).t()
    expected = [definition(values)]
    assert_records(table_on_host(warm(lambda: ng.tensor_stats(on_gpu(values), detail=True))), expected, "cuda")
    both = warm(lambda: ng.multi_tensor_stats([on_gpu(values)], detail=True))
    assert_records(table_on_host(both), expected, "cuda")


def test_the_native_backend_of_a_gpu_is_the_cuda_extension(gpus: FakeGpus) -> None:
    assert dispatch.backend_for("cuda") is cuda
    assert cuda.unavailable("cuda") is None
    assert "not on cpu" in cuda.unavailable("cpu")


# Results that travel home


def test_the_recorder_never_waits_for_a_step_to_be_recorded(gpus: FakeGpus) -> None:
    recorder = Recorder(length=3, names=["a", "b"], limit=None)
    pieces = [Piece(0, 0), Piece(1, 0)]
    flat, layout = on_gpu(normal(100)), ng.Layout([0, 40, 100])
    with fake_gpu.setting_up():
        ng.tensor_stats(flat, layout)

    def record(step: int) -> None:
        table = ng.tensor_stats(flat * (step + 1), layout)
        recorder.begin(step, 8.0, ScannedPieces(table, pieces), loss=on_gpu(torch.tensor(float(step))))
        recorder.end(applied=True)

    for step in range(5):
        record(step)
    rows = recorder.fresh(wait=False)
    assert [(row.step, row.loss) for row in rows] == [(2, 2.0), (3, 3.0), (4, 4.0)]
    assert rows[-1].norm == pytest.approx(5 * reveal(flat).double().norm().item(), rel=5e-6)
    gpus.runtime.copies_finish = False
    record(5)
    assert recorder.fresh(wait=False) == [], "nothing has arrived yet"
    with pytest.raises(HostSync, match="event"):
        recorder.read()


def test_the_recorder_does_not_wait_for_the_loss_of_gradients_that_are_on_the_cpu(gpus: FakeGpus) -> None:
    recorder = Recorder(length=3, names=["a"], limit=None)
    values = normal(100)
    with fake_gpu.setting_up():
        recorder.begin(0, 1.0, ScannedPieces(ng.tensor_stats(values), [Piece(0, 0)]), on_gpu(torch.tensor(7.0)))
    for step in range(1, 5):
        recorder.begin(
            step, 1.0, ScannedPieces(ng.tensor_stats(values), [Piece(0, 0)]), on_gpu(torch.tensor(float(step)))
        )
        recorder.end(applied=True)
    assert [(row.step, row.loss) for row in recorder.fresh(wait=False)] == [(2, 2.0), (3, 3.0), (4, 4.0)]


# Triton's launcher, up to its driver


@pytest.fixture(scope="module")
def triton_launches():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = TESTS / "support" / "triton_launch.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_triton_takes_a_launch_a_dtype_and_one_more_without_a_host_sync(triton_launches) -> None:
    flat, listed = triton_launches["flat"]["launches"], triton_launches["list"]["launches"]
    assert [(one["kernel"], one["blocks"]) for one in flat] == [("chunk_kernel", 5), ("combine_kernel", 1)]
    assert [(one["kernel"], one["dtype_bits"], one["blocks"]) for one in listed] == [
        ("chunk_kernel", 32, 1000),
        ("chunk_kernel", 16, 2),
        ("combine_kernel", 0, 1),
    ]
    assert listed[1]["integers"] == [0, 1000], "the second dtype begins where the first one's chunks end"
    assert triton_launches["device"] == "cuda:0"


def test_triton_launches_on_the_tensors_own_device_and_stream(triton_launches) -> None:
    assert {(one["device"], one["stream"]) for one in triton_launches["flat"]["launches"]} == {(0, 10)}
    assert {(one["device"], one["stream"]) for one in triton_launches["list"]["launches"]} == {(1, 11)}


@pytest.mark.parametrize("which", ["flat", "one"])
def test_triton_gets_the_address_of_a_bucket_as_a_number(triton_launches, which: str) -> None:
    (chunk, combine) = triton_launches[which]["launches"]
    assert chunk["integers"] == [triton_launches[which]["address"], 0]
    assert all(pointer % 16 == 0 for pointer in chunk["pointers"] + combine["pointers"])
    assert chunk["pointers"][-1] == combine["pointers"][-1], "the records"


# The choice between the two


def test_the_one_that_launches_faster_is_taken_if_it_runs(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    for runs, chosen in (({cuda, triton}, cuda), ({cuda}, cuda), ({triton}, triton), (set(), reference)):
        for module in (cuda, triton):
            monkeypatch.setattr(module, "unavailable", lambda _, here=module in runs: None if here else "not here")
        dispatch.backend_for.cache_clear()
        assert dispatch.backend_for("cuda") is chosen


# Beyond what an int32 counts


@pytest.fixture(scope="module")
def memory_beyond_int32() -> torch.Tensor:
    """Elements of a byte, of which only the last are ever touched: the rest is address space."""
    memory = torch.empty((1 << 31) + 2000, dtype=torch.uint8)
    memory[-2000:] = 0x38  # 0.5 in e5m2
    memory[-1500] = 0x7F  # NaN
    return memory.view(torch.float8_e5m2)


def test_a_segment_that_begins_beyond_int32(gpus: FakeGpus, memory_beyond_int32: torch.Tensor) -> None:
    flat, layout = on_gpu(memory_beyond_int32), ng.Layout([(1 << 31) + 3, (1 << 31) + 2000])
    table = table_on_host(warm(lambda: ng.tensor_stats(flat, layout, detail=True)))
    assert_records(table, [definition(memory_beyond_int32[(1 << 31) + 3 :])], "cuda")


def test_a_chunk_that_begins_beyond_int32(gpus: FakeGpus, memory_beyond_int32: torch.Tensor) -> None:
    """The last chunk of a segment of 65,537, alone."""
    number = (1 << 31) // CHUNK
    with fake_gpu.setting_up():
        home = torch.device("cuda:0")
        row = torch.tensor([[0, number, 2000, 0]], dtype=torch.int32).to(home)
        none = torch.empty((0, 3), dtype=torch.int32).to(home)
        chunks = Chunks(row, none, ((torch.float8_e5m2, 0, 1),), segments=1, rows=1)
        starts = torch.zeros(1, dtype=torch.int64, device=home)
    packed = cuda._scan_table(memory_beyond_int32.data_ptr(), starts, chunks, True)
    (record,) = ng.StatsTable(reveal(packed), detail=True).to_host()
    assert (record.nan, record.first_nonfinite) == (1, (1 << 31) + 500)
    assert record.sumsq == 1999 * 0.25
