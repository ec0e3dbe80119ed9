"""Calls in which C code reads torch's tensors: the same records as by way of the operator, and never a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hallo_numguard as ng
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.dispatch import direct_calls
from hallo_numguard.ops.schema import multi_tensor_stats_op, tensor_stats_op

from backends import forced_backend

pytestmark = pytest.mark.skipif(not native.direct_calls(), reason="needs the extension, and torch >= 2.10")

NAN, INF = math.nan, math.inf


class Marked(torch.Tensor):
    """A subclass, which may hold anything."""


def values(*shape: int) -> torch.Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    tensor.view(-1)[:3] = torch.tensor([INF, NAN, INF])
    return tensor


READ: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: values(1000),
    "two_dim": lambda: values(20, 50),
    "zero_dim": lambda: values(3)[1],
    "parameter": lambda: torch.nn.Parameter(values(1000)),
    "requires_grad": lambda: values(1000).requires_grad_() * 2,
    "half": lambda: values(1000).half(),
    "bfloat16": lambda: values(1000).bfloat16(),
    "double": lambda: values(1000).double(),
    "float8": lambda: values(1000).to(torch.float8_e5m2),
    "from_the_second": lambda: values(1001)[1:],
    "empty": lambda: values(4)[4:],
    "negated": lambda: torch._neg_view(values(1000)),
    "large": lambda: values(200_000),
}
LEFT: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: values(20, 50).t(),
    "strided": lambda: values(1000)[::2],
    "subclass": lambda: values(1000).as_subclass(Marked),
    "misaligned": lambda: torch.frombuffer(bytearray(1) + values(9).numpy().tobytes(), dtype=torch.float32, offset=1),
    "zero_tensor": lambda: torch._efficientzerotensor((4,)),
}
OFFSETS = {"one_segment": None, "layout": ng.Layout([0, 0, 1, 3])}


@pytest.mark.parametrize("make", [*READ.values(), *LEFT.values()], ids=[*READ, *LEFT])
def test_the_records_are_those_of_the_operator(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    for layout in OFFSETS.values():
        if layout is not None and layout.end > tensor.numel():
            continue
        for detail in (False, True):
            expected = tensor_stats_op(tensor, None if layout is None else layout.offsets, detail)
            table = ng.tensor_stats(tensor, layout, detail)
            assert torch.equal(table.packed, expected)
            assert type(table.packed) is type(expected)
            assert not table.packed.requires_grad
    listed = ng.multi_tensor_stats([values(7), tensor, values(9).half()], detail=True).packed
    assert torch.equal(listed[1:2], tensor_stats_op(tensor, None, True))


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_tensors_that_are_read_as_they_are(make: Callable[[], torch.Tensor]) -> None:
    direct = direct_calls()
    assert direct is not None
    assert direct.scan_tensor(make(), None, False, direct.isa) is not None
    assert direct.scan_tensors([make(), make()], False, direct.isa) is not None


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_tensors_that_are_left_to_python(make: Callable[[], torch.Tensor]) -> None:
    direct = direct_calls()
    assert direct is not None
    assert direct.scan_tensor(make(), None, False, direct.isa) is None
    assert direct.scan_tensors([values(3), make()], False, direct.isa) is None


def test_infinities_of_a_negated_view_have_the_signs_that_torch_shows() -> None:
    negated = torch._neg_view(torch.tensor([INF, INF, -INF, 1.0]))
    for table in (ng.tensor_stats(negated), ng.multi_tensor_stats([negated])):
        assert (table.pos_inf.item(), table.neg_inf.item()) == (1, 2)


def test_memory_that_a_transform_of_functions_hides_is_not_read() -> None:
    for call in (ng.tensor_stats, lambda tensor: ng.multi_tensor_stats([tensor])):
        packed = torch.func.functionalize(lambda tensor, call=call: call(tensor).packed)(values(5))
        assert torch.equal(packed, tensor_stats_op(values(5), None, False))


def test_a_layout_that_is_too_long_is_refused() -> None:
    with pytest.raises(ng.InvalidInput, match="end at 5, but the flat tensor has only 4"):
        ng.tensor_stats(torch.ones(4), ng.Layout([0, 5]))


def test_another_backend_is_asked_where_it_is_wanted() -> None:
    with forced_backend("reference"):
        assert direct_calls() is None
        assert ng.tensor_stats(values(9)).nan.item() == 1


def test_a_dispatch_mode_sees_the_operators() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        ng.tensor_stats(values(9), OFFSETS["layout"])
        ng.multi_tensor_stats([values(9)])
    assert tensor_stats_op in seen
    assert multi_tensor_stats_op in seen


def test_a_traced_function_has_the_operators() -> None:
    def measure(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ng.tensor_stats(tensor, OFFSETS["layout"]).packed, ng.multi_tensor_stats([tensor]).packed

    traced = torch.jit.trace(measure, values(9), check_trace=False)
    for result, expected in zip(traced(values(9) * 2), measure(values(9) * 2), strict=True):
        assert torch.equal(result, expected)


def test_a_list_that_changes_keeps_its_records_apart() -> None:
    """Chunk tables are kept by sizes, more of them than are kept."""
    for size in (*range(1, 40), *range(1, 40)):
        tensors = [torch.full((size,), 2.0), torch.full((2 * size,), 1.0)]
        assert ng.multi_tensor_stats(tensors).sumsq.tolist() == [4.0 * size, 2.0 * size]
