"""Layout: what is cached in it, and how an operator finds it again."""

from __future__ import annotations

import pytest
import torch

import hallo_numguard as ng
from hallo_numguard.guard.parameter_stats import Piece, by_parameter


def test_a_layout_describes_itself() -> None:
    layout = ng.Layout([2, 5, 5, 9])
    assert (layout.segments, layout.end) == (3, 9)
    assert layout.offsets.tolist() == [2, 5, 5, 9]
    assert layout.offsets.dtype == torch.int64
    assert repr(layout) == "Layout(3 segments, 9 elements)"


def test_a_table_is_made_once() -> None:
    layout = ng.Layout([0, 4])
    made: list[list[int]] = []

    def make(offsets: list[int]) -> int:
        made.append(offsets)
        return len(made)

    assert [layout.table("a", make), layout.table("a", make), layout.table("b", make)] == [1, 1, 2]
    assert made == [[0, 4], [0, 4]]


def test_its_offsets_lead_back_to_it() -> None:
    layout = ng.Layout([0, 4])
    assert ng.Layout.of(layout.offsets) is layout
    assert ng.Layout.of(torch.tensor([0, 4])) is not layout


def test_the_offsets_given_are_copied() -> None:
    given = torch.tensor([0, 4])
    layout = ng.Layout(given)
    given[1] = 2
    assert layout.offsets.tolist() == [0, 4]


@pytest.mark.parametrize("end", [4, 10])
def test_padding_fits_and_more_does_not(end: int) -> None:
    layout = ng.Layout([0, end])
    layout.check_fits(end)
    layout.check_fits(end + 1)
    with pytest.raises(ng.InvalidInput, match=f"end at {end}.*only {end - 1} elements"):
        layout.check_fits(end - 1)


def test_a_block_of_columns_has_the_whole_matrixs_index() -> None:
    """Columns 4 to 7 of a 3 x 8 matrix, which this rank holds as 3 x 4."""
    block = torch.zeros(3, 4)
    block[2, 1] = block[2, 3] = float("nan")
    table = ng.tensor_stats(block)
    for piece, index in ((Piece(0, 4, 4, 8), 2 * 8 + 5), (Piece(0, 5), 5 + 9)):
        stats = by_parameter(table, [piece], 1)
        assert (stats.first.item(), stats.counts.tolist()) == (index, [[2, 0, 0]])
