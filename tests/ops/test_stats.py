"""tensor_stats and multi_tensor_stats, on every backend."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import library

import hallo_numguard as ng
from hallo_numguard.core.records import Record
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.schema import multi_tensor_stats_op, tensor_stats_op

from backends import BACKENDS, NATIVE, TRITON, clear_choices, forced_backend
from cases import CASES, Case, definition, expected_of, flat_of

DTYPES = list(FORMATS)
NAN, INF = math.nan, math.inf


def tolerance(backend: str) -> float:
    """Relative, of the norm."""
    return 5e-6 if backend.startswith("triton") else 1e-6


def assert_records(table: ng.StatsTable, expected: list[Record], backend: str) -> None:
    """Everything is exact, but the norm of the finite elements."""
    records = table.to_host()
    assert len(records) == len(expected)
    for segment, (record, truth) in enumerate(zip(records, expected, strict=True)):
        assert without_sum(record) == without_sum(truth), f"segment {segment}"
        norm = pytest.approx(math.sqrt(truth.sumsq), rel=tolerance(backend), abs=0)
        assert math.sqrt(record.sumsq) == norm, f"segment {segment}"


def without_sum(record: Record) -> tuple[object, ...]:
    return (
        record.nan,
        record.pos_inf,
        record.neg_inf,
        record.zeros,
        record.subnormals,
        record.first_nonfinite,
        record.absmax,
    )


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 42) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


# Values


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_backend_gives_what_the_definition_says(each_cpu_backend: str, case: Case) -> None:
    assert_is_defined(case, each_cpu_backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("case", [case for case in CASES if (case.values, case.plant) == ("normal", "mixed")], ids=str)
def test_triton_gives_what_the_definition_says(backend: str, case: Case) -> None:
    """In every case its bits are those of the CUDA kernels, and these what the definition says: test_cuda_kernels.py"""
    with forced_backend(backend):
        assert_is_defined(case, backend)


def assert_is_defined(case: Case, backend: str) -> None:
    flat = flat_of(case)
    table = ng.tensor_stats(flat, case.offsets, detail=True)
    assert table.packed.dtype == torch.int64
    assert table.packed.device == flat.device
    assert_records(table, list(expected_of(case)), backend)


@pytest.mark.parametrize("case", [case for case in CASES if case.layout in ("ragged", "unaligned")], ids=str)
def test_without_detail_only_the_counts_of_zeros_and_subnormals_are_missing(each_native: str, case: Case) -> None:
    with_detail = ng.tensor_stats(flat_of(case), case.offsets, detail=True).packed.clone()
    with_detail[:, 3:5] = 0
    assert torch.equal(ng.tensor_stats(flat_of(case), case.offsets).packed, with_detail)


@pytest.mark.parametrize("ones", [1, 16, 64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("rounding", ["up", "down"])
@each_dtype
def test_the_norm_is_exact_enough_when_every_rounding_goes_one_way(
    each_backend: str, dtype: torch.dtype, rounding: str, ones: int
) -> None:
    """Squares around half an ulp of the sum in float32 that they are added to."""
    large = 256.0 if dtype is torch.float8_e4m3fn else 1.0
    nudge = 2.0 ** -FORMATS[dtype].mantissa if dtype.itemsize < 4 else 2.0**-20
    small = large * 2.0**-12 * (1 + nudge if rounding == "up" else 1 - nudge / 2)
    values = torch.full((9000,), small).to(dtype)
    values[:ones] = large
    assert_records(ng.tensor_stats(values, detail=True), [definition(values)], each_backend)


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


def flushes() -> bool:
    return (torch.tensor([1e-40]) * 1.0).item() == 0.0


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.layout == "unaligned" and case.values in ("normal", "small", "subnormal")],
    ids=str,
)
def test_flushing_subnormals_changes_nothing(each_cpu_backend: str, case: Case, flushed_subnormals: None) -> None:
    flushed = ng.tensor_stats(flat_of(case), case.offsets, detail=True).packed
    assert flushes(), "the caller's state was changed"
    torch.set_flush_denormal(False)
    kept = ng.tensor_stats(flat_of(case), case.offsets, detail=True).packed
    assert not flushes(), "the caller's state was changed"
    assert torch.equal(flushed, kept)


# Memory

ARRANGEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t(),
    "every_second_row": lambda x: x[::2],
    "every_third_column": lambda x: x[:, ::3],
    "expanded": lambda x: x[:1].expand(4, -1),
    "from_the_second_element": lambda x: x.reshape(-1)[1:],
    "one_element": lambda x: x[0, :1],
    "zero_dim": lambda x: x[0, 0],
    "three_dim": lambda x: x.reshape(4, -1, 3).transpose(0, 2),
    "empty": lambda x: x[:0],
    "requires_grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
@each_dtype
def test_elements_count_in_row_major_order_wherever_they_lie(
    each_backend: str, dtype: torch.dtype, arrangement: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    matrix = normal(36, 51)
    matrix[0, 0], matrix[3, 5], matrix[20, 33] = NAN, -INF, INF
    values = arrangement(matrix.to(dtype))
    table = ng.tensor_stats(values, detail=True)
    assert not table.packed.requires_grad
    assert_records(table, [definition(values.detach())], each_backend)
    assert_records(ng.multi_tensor_stats([values], detail=True), [definition(values.detach())], each_backend)


@pytest.mark.parametrize("shift", [1, 3])
@each_dtype
def test_memory_that_no_element_size_divides(each_backend: str, dtype: torch.dtype, shift: int) -> None:
    values = normal(5000, dtype=dtype)
    values[4321] = NAN
    memory = bytearray(shift) + values.view(torch.uint8).numpy().tobytes()
    moved = torch.frombuffer(memory, dtype=dtype, offset=shift)
    assert_records(ng.tensor_stats(moved, detail=True), [definition(values)], each_backend)


OFFSETS = {
    "list": lambda values: values,
    "tuple": tuple,
    "int64_tensor": torch.tensor,
    "int32_tensor": lambda values: torch.tensor(values, dtype=torch.int32),
    "layout": ng.Layout,
    "offsets_of_a_layout": lambda values: ng.Layout(values).offsets,
}


@pytest.mark.parametrize("form", OFFSETS.values(), ids=OFFSETS.keys())
def test_offsets_in_every_form(
    each_backend: str, form: Callable[[list[int]], ng.Layout | list[int] | torch.Tensor]
) -> None:
    flat = normal(300)
    expected = [definition(flat[2:2]), definition(flat[2:100]), definition(flat[100:299])]
    table = ng.tensor_stats(flat, form([2, 2, 100, 299]), detail=True)
    assert_records(table, expected, each_backend)


def test_offsets_without_segments(each_backend: str) -> None:
    table = ng.tensor_stats(normal(10), [3])
    assert len(table) == 0
    assert table.to_host() == []
    assert table.found_inf().item() == 0.0
    assert table.total_norm().item() == 0.0


def test_only_empty_segments(each_backend: str) -> None:
    table = ng.tensor_stats(torch.empty(0), [0, 0, 0], detail=True)
    assert_records(table, [definition(torch.empty(0))] * 2, each_backend)


def test_one_layout_serves_every_dtype(each_backend: str) -> None:
    layout = ng.Layout([1, 4, 900])
    for dtype in DTYPES:
        flat = normal(1000, dtype=dtype)
        expected = [definition(flat[1:4]), definition(flat[4:900])]
        assert_records(ng.tensor_stats(flat, layout, detail=True), expected, each_backend)


def test_a_list_of_tensors_of_every_dtype_and_stride(each_backend: str) -> None:
    tensors = [normal(7, 9, dtype=dtype, seed=seed) for seed, dtype in enumerate(DTYPES * 2)]
    tensors += [
        normal(40, 50).t(),
        torch.tensor(NAN),
        torch.empty(0, 3),
        normal(70_000, dtype=torch.bfloat16)[1:],
        torch.full((3,), -INF, dtype=torch.float16),
        torch.nn.Parameter(normal(5)),
    ]
    table = ng.multi_tensor_stats(tensors, detail=True)
    assert_records(table, [definition(tensor.detach()) for tensor in tensors], each_backend)


def test_a_tensor_that_is_twice_in_a_list(each_backend: str) -> None:
    values = normal(100)
    assert_records(ng.multi_tensor_stats([values, values], detail=True), [definition(values)] * 2, each_backend)


def test_no_tensors(each_backend: str) -> None:
    table = ng.multi_tensor_stats([])
    assert len(table) == 0
    assert table.to_host() == []
    assert table.packed.device.type == "cpu"


def test_a_new_default_device_is_not_ours(each_backend: str) -> None:
    values = normal(100)
    with torch.device("meta"):
        tables = [ng.tensor_stats(values), ng.tensor_stats(values, [0, 40, 100])]
        tables.append(ng.multi_tensor_stats([values, values.double()]))
    torch.set_default_device("meta")
    try:
        tables += [ng.tensor_stats(values), ng.tensor_stats(values, [0, 40, 100])]
        tables.append(ng.multi_tensor_stats([values, values.double()]))
    finally:
        torch.set_default_device(None)
    for table in tables:
        assert table.packed.device.type == "cpu"
        assert table.absmax.max().item() == values.abs().max().item()


# The table


def test_properties_of_a_table(each_backend: str) -> None:
    flat = torch.tensor([3.0, -4.0, 0.0, NAN, INF, -INF, 2.0, 1e-40, INF, -5.0])
    table = ng.tensor_stats(flat, [0, 3, 7, 8, 8, 10], detail=True)
    assert len(table) == 5
    assert table.nan.tolist() == [0, 1, 0, 0, 0]
    assert table.pos_inf.tolist() == [0, 1, 0, 0, 1]
    assert table.neg_inf.tolist() == [0, 1, 0, 0, 0]
    assert table.nonfinite.tolist() == [0, 3, 0, 0, 1]
    assert table.finite.tolist() == [1, 0, 1, 1, 0]
    assert table.zeros.tolist() == [1, 0, 0, 0, 0]
    assert table.subnormals.tolist() == [0, 0, 1, 0, 0]
    assert table.first_nonfinite.tolist() == [-1, 0, -1, -1, 0]
    assert table.absmax.tolist() == [4.0, 2.0, flat[7].item(), 0.0, 5.0]
    assert table.sumsq.tolist() == [25.0, 4.0, flat[7].item() ** 2, 0.0, 25.0]
    assert table.absmax.dtype == table.sumsq.dtype == table.norm().dtype == torch.float64
    assert table.nan.dtype == table.nonfinite.dtype == table.finite.dtype == torch.int64
    assert "5 segments" in repr(table)


def test_norm_is_as_torch_would_give_it(each_backend: str) -> None:
    segments = [[3.0, -4.0], [1.0, INF], [-INF], [NAN, INF], [NAN], []]
    ends = torch.tensor([len(segment) for segment in segments]).cumsum(0).tolist()
    flat = torch.tensor([value for segment in segments for value in segment])
    norm = ng.tensor_stats(flat, [0, *ends]).norm()
    expected = [torch.tensor(segment).norm().item() for segment in segments]
    assert norm.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "total", "found"),
    [
        pytest.param([3.0, 0.0, 4.0], 5.0, 0.0, id="finite"),
        pytest.param([3.0, -INF, 4.0], INF, 1.0, id="inf"),
        pytest.param([INF, NAN, 4.0], NAN, 1.0, id="nan"),
    ],
)
def test_total_norm_and_found_inf(each_backend: str, values: list[float], total: float, found: float) -> None:
    table = ng.tensor_stats(torch.tensor(values), [0, 1, 2, 3])
    assert table.total_norm().item() == pytest.approx(total, nan_ok=True)
    assert table.total_norm().dim() == table.found_inf().dim() == 0
    assert table.total_norm().dtype == torch.float64
    assert table.found_inf().item() == found
    assert table.found_inf().dtype == torch.float32


def test_to_host_gives_records(each_backend: str) -> None:
    flat = torch.tensor([1.0, 0.0, NAN])
    (record,) = ng.tensor_stats(flat).to_host()
    assert record == Record(nan=1, pos_inf=0, neg_inf=0, absmax=1.0, sumsq=1.0, first_nonfinite=2)
    assert record.nonfinite == 1
    assert math.isnan(record.norm)
    (record,) = ng.tensor_stats(flat, detail=True).to_host()
    assert (record.zeros, record.subnormals) == (1, 0)


@pytest.mark.parametrize("name", ["zeros", "subnormals"])
def test_what_was_not_counted_cannot_be_read(name: str) -> None:
    with pytest.raises(ng.InvalidInput, match="detail=True"):
        getattr(ng.tensor_stats(torch.ones(3)), name)


# Errors

REFUSED = {
    "integer": (lambda: torch.arange(3), "expected a tensor.* of float32, .*got torch.int64"),
    "bool": (lambda: torch.ones(3, dtype=torch.bool), "expected a tensor.*got torch.bool"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "float8_e5m2, got torch.complex64"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "dense tensor.*sparse_coo.*values"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "dense tensor.*sparse_csr.*values"),
    "meta": (lambda: torch.empty(3, device="meta"), "with data.*meta"),
    "list": (lambda: [1.0, 2.0], "expected a tensor.*list"),
    "none": (lambda: None, "expected a tensor.*NoneType"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_are_refused(make: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ng.InvalidInput, match=message):
        ng.tensor_stats(make())
    with pytest.raises(ng.InvalidInput, match=message):
        ng.multi_tensor_stats([torch.ones(2), make()])


def test_a_refused_tensor_of_a_list_is_named_by_its_position() -> None:
    with pytest.raises(ng.InvalidInput, match="position 2"):
        ng.multi_tensor_stats([torch.ones(2), torch.ones(2), torch.arange(3)])


BAD_OFFSETS = {
    "decreasing": ([0, 5, 4], "never decrease, got 5 and then 4 at index 2"),
    "negative": ([-1, 5], "not be negative, got -1"),
    "too_long": ([0, 11], "end at 11, but the flat tensor has only 10"),
    "none_at_all": ([], "n \\+ 1 integers"),
    "floats": ([0.0, 5.0], "integers"),
    "float_tensor": (torch.tensor([0.0, 5.0]), "1-D integer tensor.*float32"),
    "matrix": (torch.tensor([[0, 5]]), "1-D integer tensor.*\\(1, 2\\)"),
    "nested": ([[0, 5]], "integers"),
    "text": ("05", "a sequence of integers or a tensor, got str"),
    "number": (5, "a sequence of integers or a tensor, got int"),
}


@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS.keys())
def test_offsets_that_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(ng.InvalidInput, match=message):
        ng.tensor_stats(torch.ones(10), offsets)


def test_errors_are_value_errors_of_this_package() -> None:
    assert issubclass(ng.InvalidInput, ValueError)
    assert issubclass(ng.InvalidInput, ng.NumGuardError)


# The choice of the backend


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    clear_choices()
    yield monkeypatch
    clear_choices()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        pytest.param(dispatch.BACKEND_VARIABLE, "cuda", "no such backend.*native", id="unknown"),
        pytest.param(native.ISA_VARIABLE, "mmx", "this CPU runs portable", id="unknown_isa"),
    ],
)
def test_a_backend_that_cannot_be_had_is_an_error(
    environment: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    environment.setenv(variable, value)
    with pytest.raises(ng.BackendUnavailable, match=message):
        ng.tensor_stats(torch.ones(3))


def test_triton_says_why_it_cannot_run(environment: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    triton = dispatch.backend("triton")
    assert triton.unavailable("cpu") is None
    assert "interpreter" in triton.unavailable("cuda")
    assert "xpu" in triton.unavailable("xpu")
    environment.delenv("TRITON_INTERPRET")
    assert (triton.unavailable("cuda") is None) == torch.cuda.is_available()
    environment.setenv(dispatch.BACKEND_VARIABLE, "triton")
    with pytest.raises(ng.BackendUnavailable, match="TRITON_INTERPRET=1"):
        ng.tensor_stats(torch.ones(3))


def test_on_the_cpu_the_native_backend_is_the_default(environment: pytest.MonkeyPatch) -> None:
    if not native.isas():
        pytest.skip("the extension was not built")
    assert dispatch.backend_for("cpu") is dispatch.backend("native")
    assert dispatch.explain("cpu")["native"] is None


# Determinism


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bucket(dtype: torch.dtype, size: int) -> torch.Tensor:
    """Values of all magnitudes that the format has, and a few that are none."""
    values = (normal(size, seed=1) * normal(size, seed=2).exp()).to(dtype)
    values[size // 3], values[size // 2], values[-1] = NAN, -INF, NAN
    return values


@each_dtype
def test_any_number_of_threads_gives_the_same_bits(each_native: str, dtype: torch.dtype) -> None:
    flat = bucket(dtype, 700_001)
    layout = ng.Layout([1, 5, 70_000, 70_000, 400_003, 700_001])
    packed = []
    for threads in (1, 2, 3, 7, 1, 2):
        with torch_threads(threads):
            packed += [
                ng.tensor_stats(flat, layout).packed,
                ng.multi_tensor_stats(
                    [flat[1:5], flat[5:70_000], flat[:0], flat[70_000:400_003], flat[400_003:]]
                ).packed,
            ]
    assert all(torch.equal(packed[0], other) for other in packed)


@pytest.mark.parametrize("detail", [False, True], ids=["plain", "detail"])
@each_dtype
def test_any_address_gives_the_same_bits(each_native: str, dtype: torch.dtype, detail: bool) -> None:
    values = bucket(dtype, 20_003)
    buffer = torch.zeros(values.numel() + 80, dtype=dtype)
    expected = ng.tensor_stats(values, [0, 7, 9000, 20_003], detail).packed
    for shift in (*range(17), 31, 32, 63, 64):
        moved = buffer[shift : shift + values.numel()]
        moved.copy_(values)
        packed = ng.tensor_stats(moved, [0, 7, 9000, 20_003], detail).packed
        assert torch.equal(packed, expected), f"{shift} elements further"


def test_a_backend_gives_the_same_bits_every_time(each_backend: str) -> None:
    flat = bucket(torch.bfloat16, 70_000)
    first, second = (ng.tensor_stats(flat, [0, 3, 70_000]).packed for _ in range(2))
    assert torch.equal(first, second)


def test_python_threads_may_call_at_once(each_native: str) -> None:
    flat = bucket(torch.float32, 700_001)
    layout = ng.Layout([0, 1000, 700_001])
    results: list[torch.Tensor] = []
    start = threading.Barrier(4)

    def call() -> None:
        start.wait()
        results.extend(ng.tensor_stats(flat, layout).packed for _ in range(20))

    with torch_threads(2):
        expected = ng.tensor_stats(flat, layout).packed
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 80
    assert all(torch.equal(expected, result) for result in results)


# Size


@pytest.fixture(scope="module")
def beyond_int32() -> torch.Tensor:
    """2.2e9 zeros but for one NaN near the end."""
    size = 2_200_000_000
    memory = Path("/proc/meminfo")
    if memory.exists():
        available = int(memory.read_text().split("MemAvailable:")[1].split()[0])
        if available * 1024 < 2 * size:
            pytest.skip("not enough memory for 2.2 GB")
    flat = torch.zeros(size, dtype=torch.uint8).view(torch.float8_e5m2)
    flat[2_199_999_990] = NAN
    return flat


@pytest.mark.skipif(not NATIVE, reason="takes minutes without the extension")
def test_more_elements_than_an_int32_counts(beyond_int32: torch.Tensor) -> None:
    with forced_backend(NATIVE[-1]):
        for table in (ng.tensor_stats(beyond_int32), ng.multi_tensor_stats([beyond_int32])):
            assert table.first_nonfinite.tolist() == [2_199_999_990]
            assert table.nan.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_that_begin_where_an_int32_ends(beyond_int32: torch.Tensor, backend: str) -> None:
    offsets = [2**31 - 10, 2**31 + 5, 2**31 + 2000, 2_199_999_980, 2_199_999_999]
    layout = offsets if backend.startswith("native") else offsets[-2:]
    with forced_backend(backend):
        table = ng.tensor_stats(beyond_int32, layout, detail=True)
    assert table.first_nonfinite[-1].item() == 10
    assert table.zeros[-1].item() == 18


# Processes


class Buckets(torch.utils.data.Dataset):
    """Every item is a table that the worker computed with two threads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        flat = bucket(torch.float32, 700_001)
        with torch_threads(2):
            return ng.tensor_stats(flat, [0, 9, 700_001]).packed


@pytest.mark.timeout(60)
def test_a_forked_child_works(each_native: str) -> None:
    flat = bucket(torch.float32, 700_001)
    with torch_threads(2):
        expected = ng.tensor_stats(flat, [0, 9, 700_001]).packed
        child = os.fork()
        if child == 0:
            # pytest must not go on in the child, and torch's own threads do not survive a fork.
            try:
                same = torch.equal(ng.tensor_stats(flat, [0, 9, 700_001]).packed, expected)
                os._exit(0 if same else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(ng.tensor_stats(flat, [0, 9, 700_001]).packed, expected)


def test_a_worker_of_a_data_loader_works(each_native: str) -> None:
    with torch_threads(2):
        expected = Buckets()[0]
        loader = torch.utils.data.DataLoader(
            Buckets(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30
        )
        assert all(torch.equal(packed, expected) for packed in loader)


# Torch's view of the operators


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 10]], ids=["one_segment", "offsets"])
def test_tensor_stats_is_a_well_formed_operator(each_backend: str, offsets: list[int] | None, grad: bool) -> None:
    flat = normal(10).requires_grad_(grad)
    where = None if offsets is None else torch.tensor(offsets)
    library.opcheck(tensor_stats_op, (flat, where, True))


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
def test_multi_tensor_stats_is_a_well_formed_operator(each_backend: str, grad: bool) -> None:
    tensors = [normal(10).requires_grad_(grad), normal(3, 4, dtype=torch.float16)]
    library.opcheck(multi_tensor_stats_op, (tensors, False))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_without_a_graph_break(compiler: str) -> None:
    torch.compiler.reset()
    layout = ng.Layout([0, 3, 10])

    def measure(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = ng.tensor_stats(flat * 2, layout)
        whole = ng.multi_tensor_stats([flat, flat + 1])
        return table.absmax, table.nonfinite, table.norm(), table.found_inf(), whole.total_norm()

    compiled = torch.compile(measure, fullgraph=True, backend=compiler)
    for flat in (normal(10), torch.tensor([NAN] + [1.0] * 9)):
        for result, expected in zip(compiled(flat), measure(flat), strict=True):
            assert torch.allclose(result, expected, equal_nan=True)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_with_offsets_from_a_list(compiler: str) -> None:
    torch.compiler.reset()

    def measure(flat: torch.Tensor) -> torch.Tensor:
        return ng.tensor_stats(flat, [0, 3, 10]).absmax

    compiled = torch.compile(measure, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(normal(10)), measure(normal(10)))
