"""The numbers inside of any tensor: what is read, where it stands in the whole, and what is named because it is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from unusual_tensors import Frozen, Labelled, Opaque, Quantized

from hallo_numguard.guard import readable
from hallo_numguard.guard.named_tensors import NamedTensor, named_buffers, scan_tensors
from hallo_numguard.guard.readable import UncheckedTensors

NAN = float("nan")


def dense(index=(3, 1)):
    values = torch.arange(1.0, 25.0).reshape(6, 4)
    values[index] = NAN
    return values


def sparse(index=(3, 1)):
    """Row 3 comes twice, before and after row 1."""
    rows = torch.tensor([[3, 1, 3]])
    values = torch.ones(3, 4)
    values[0, index[1]] = NAN
    return torch.sparse_coo_tensor(rows, values, (6, 4))


def quantized(index=(3, 1)):
    found = Quantized.of(torch.ones(6, 4))
    found.scale[index[0]] = NAN
    return found


KINDS = {
    "plain": (dense(), (3, 1)),
    "parameter": (nn.Parameter(dense()), (3, 1)),
    "transposed": (dense((1, 3)).reshape(6, 4).t().contiguous().t(), (1, 3)),
    "expanded": (torch.tensor([[1.0], [NAN]]).expand(2, 3), (1, 0)),
    "channels last": (
        torch.stack([torch.zeros(2, 2), torch.full((2, 2), NAN)])[None].to(memory_format=torch.channels_last),
        (0, 1, 0, 0),
    ),
    "scalar": (torch.tensor(NAN), ()),
    "sparse": (sparse(), (3, 1)),
    "sparse in two dimensions": (
        dense().nan_to_num(7.0).index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(NAN)).to_sparse(),
        (3, 1),
    ),
    "csr": (dense().to_sparse_csr(), (3, 1)),
    "csc": (dense().to_sparse_csc(), (3, 1)),
    "bsr": (dense().to_sparse_bsr((2, 2)), (3, 1)),
    "complex": (torch.complex(torch.zeros(6, 4), dense()), (3, 1)),
    "conjugate": (torch.complex(torch.zeros(6, 4), dense()).conj(), (3, 1)),
    "sparse complex": (torch.complex(torch.ones(6, 4), dense()).to_sparse(), (3, 1)),
    "subclass": (dense().as_subclass(Labelled), (3, 1)),
    "quantized, by its scale": (quantized(), (3, 0)),
    "float8": (dense().to(torch.float8_e5m2), (3, 1)),
}


@pytest.mark.parametrize(("tensor", "index"), KINDS.values(), ids=KINDS)
def test_a_bad_number_is_found_at_its_place_in_the_whole_tensor(tensor, index):
    item = NamedTensor("parameter", "weight", tensor)
    stats = scan_tensors([NamedTensor("parameter", "first", torch.ones(3)), item, item])
    assert stats.bad_positions() == [1, 2]
    offender = item.offender(stats, 1, 0)
    assert (offender.index, offender.shape) == (index, tuple(tensor.shape))
    assert offender.nan >= 1


def test_norms_are_those_of_the_whole_tensor():
    rows = torch.sparse_coo_tensor(torch.tensor([[3, 1, 3]]), torch.ones(3, 4), (6, 4))
    whole = [rows, torch.complex(torch.ones(5), 2 * torch.ones(5)), torch.ones(2, 3).as_subclass(Labelled)]
    found = readable.scan(whole)
    assert list(found.owners) == [0, 1, 2]
    norms = [float(torch.linalg.vector_norm(rows.to_dense())), 5.0, math.sqrt(6)]
    assert found.table.norm().tolist() == pytest.approx(norms)
    assert [float(readable.norm_by_torch(tensor)) for tensor in whole] == pytest.approx(norms)


def test_what_has_nothing_to_read_has_no_row():
    nothing = [torch.arange(3), torch.ones(2, device="meta"), Opaque(torch.ones(3)), torch.ones(2, 2).to_mkldnn()]
    found = readable.scan([*nothing, torch.ones(2)])
    assert (list(found.owners), list(found.unread)) == ([4], [0, 1, 2, 3])
    assert scan_tensors([NamedTensor("input", "x", tensor) for tensor in nothing]).bad_positions() == []


def test_an_empty_sparse_tensor_is_finite():
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 4), (6, 4))
    assert readable.scan([empty]).table.finite.tolist() == [1]


def test_components_of_nested_tensors_are_read():
    parts = [torch.ones(2, 3), torch.full((1, 3), NAN), torch.ones(4, 3)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        found = readable.scan([nested])
        bad = found.table.first_nonfinite
        assert bad[bad >= 0].tolist() == [6]
    names = [name for name, _ in readable.readable_tensors([("x", torch.nested.nested_tensor(parts))])]
    assert names == ["x[0]", "x[1]", "x[2]"]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert [name for name, _ in readable.readable_tensors([("x", jagged)])] == ["x.values()"]


class Blocks(torch.Tensor):
    """Integers, with their scales as attributes: there, and in an object there."""


class Scales:
    def __init__(self, absmax):
        self.absmax = absmax


def test_scales_that_hang_on_integers_are_read():
    weight = torch.zeros(8, dtype=torch.uint8).as_subclass(Blocks)
    weight.quant_state = Scales(torch.tensor([1.0, NAN]))
    assert readable.scan([weight]).table.first_nonfinite.tolist() == [4]
    weight.SCB = torch.tensor([1.0, 1.0, NAN, 1.0])
    found = readable.scan([weight])
    assert sorted(found.table.first_nonfinite.tolist()) == [4, 4]
    assert list(found.owners) == [0, 0]


def test_a_reader_finds_out_when_kinds_change():
    reader = readable.Reader()
    plain = [torch.ones(3), torch.ones(2)]
    assert list(reader.scan(plain).owners) == [0, 1]
    assert reader.are_plain
    mixed = [torch.ones(3), sparse()]
    assert reader.scan(mixed).table.first_nonfinite.tolist() == [-1, 13]
    assert not reader.are_plain
    assert list(reader.scan(plain).owners) == [0, 1]


def test_what_is_not_checked_is_named_once_by_reason():
    unchecked = UncheckedTensors()
    model = Frozen()
    for name, tensor in [*model.named_parameters(), *model.named_parameters()]:
        unchecked.add_if_unread(name, tensor)
    finding = unchecked.finding()
    assert (finding.kind, finding.severity) == ("not_checked", "info")
    assert finding.message == "3 tensors are not checked, because they hold integers: codes, signed, mask"
    assert unchecked.finding() is None
    unchecked.add_if_unread("codes", model.codes)
    assert unchecked.finding() is None
    unchecked.add_if_unread("a", Opaque(torch.ones(3)))
    for number in range(5):
        unchecked.add_if_unread(f"b{number}", torch.ones(2, device="meta"))
    finding = unchecked.finding()
    assert finding.severity == "warning"
    assert finding.message == (
        "1 tensor is not checked, because a Opaque shows no floating-point tensor inside: a; 5 tensors are not "
        "checked, because they are on the meta device, without data: b0, b1, b2 and 2 more"
    )


def test_buffers_of_integers_are_no_news():
    assert [item.name for item in named_buffers(Frozen())] == ["rotation"]


def test_parameters_without_a_shape_yet_are_left_out():
    weight = nn.LazyLinear(3).weight
    item = NamedTensor("parameter", "weight", weight)
    assert scan_tensors([item]).bad_positions() == []
    assert item.whole_shape == ()
