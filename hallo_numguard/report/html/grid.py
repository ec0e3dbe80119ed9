"""Heat maps as numbers: rows of cells, merged if there are too many to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_ROWS = 2000
MAX_COLUMNS = 120
_MAX_DEPTH = 12  # parts of a name by which rows are grouped
_NOT_A_NUMBER = "×"
_INFINITE = "∞"


class Cell(NamedTuple):
    """Figures of one cell.

    Attributes:
        absmax: Largest absolute value among the finite elements.
        nonfinite: Number of non-finite elements.
        infinite: Number of these that are known to be infinite.
    """

    absmax: float
    nonfinite: int = 0
    infinite: int = 0

    @property
    def mark(self) -> str:
        """× if there may be NaN, ∞ if there are infinities only, "" if all is finite."""
        if not self.nonfinite:
            return ""
        return _INFINITE if self.infinite == self.nonfinite else _NOT_A_NUMBER


def merged(one: Cell | None, other: Cell | None) -> Cell | None:
    """Returns a cell for the elements of two cells."""
    if one is None or other is None:
        return one or other
    return Cell(max(one.absmax, other.absmax), one.nonfinite + other.nonfinite, one.infinite + other.infinite)


@dataclass
class Grid:
    """Rows by name, with a cell or None for each column.

    Attributes:
        columns: Labels of the columns.
        rows: Cells by name of the row.
        note: Sentence on merged rows; "" if there are none.
    """

    columns: list[str]
    rows: dict[str, list[Cell | None]] = field(default_factory=dict)
    note: str = ""

    def add(self, name: str, column: int, cell: Cell) -> None:
        """Merges a cell into the cell of a row and column."""
        row = self.rows.setdefault(name, [None] * len(self.columns))
        row[column] = merged(row[column], cell)


def bins(labels: Sequence[str], limit: int) -> tuple[list[str], list[int]]:
    """Merges neighbouring columns if there are more than `limit`.

    Returns:
        Labels of the remaining columns, and for each old column the position of its new one.
    """
    width = math.ceil(len(labels) / limit) or 1
    starts = range(0, len(labels), width)
    parts = [labels[start : start + width] for start in starts]
    left = [part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return left, [position // width for position in range(len(labels))]


def with_fewer_rows(grid: Grid, first: Iterable[str] = (), limit: int = MAX_ROWS) -> Grid:
    """Returns a grid of at most `limit` rows: finite rows of the same module become one.

    Args:
        grid: The grid.
        first: Rows that keep a row of their own before any others.
        limit: Number of rows: one half for rows on their own, the other for modules.
    """
    if len(grid.rows) <= limit:
        return grid
    bad = [name for name, row in grid.rows.items() if any(cell is not None and cell.nonfinite for cell in row)]
    wanted = dict.fromkeys([*(name for name in first if name in grid.rows), *bad])
    alone = set(list(wanted)[: limit // 2])
    depth = _depth([name for name in grid.rows if name not in alone], limit // 2)
    fewer = Grid(grid.columns)
    members: dict[str, list[str]] = {}
    for name in grid.rows:
        label = name if name in alone else f"{_prefix(name, depth)}.*" if depth else "all others"
        members.setdefault(label, []).append(name)
    for label, names in members.items():
        title = label if label in alone else f"{label} ({len(names)} tensors)"
        fewer.rows[title] = _column_by_column([grid.rows[name] for name in names])
    fewer.note = (
        f"{len(grid.rows)} tensors: {len(alone)} of the {len(bad)} that are not finite have their own row, "
        f"the rest are together by module, with their largest value."
    )
    return fewer


def _column_by_column(rows: Sequence[list[Cell | None]]) -> list[Cell | None]:
    total = list(rows[0])
    for row in rows[1:]:
        total = [merged(one, other) for one, other in zip(total, row, strict=True)]
    return total


def _depth(names: Sequence[str], limit: int) -> int:
    """Returns the number of parts of names that make at most `limit` different prefixes; 0 if even one makes more."""
    for depth in range(_MAX_DEPTH, 0, -1):
        if len({_prefix(name, depth) for name in names}) <= limit:
            return depth
    return 0


def _prefix(name: str, depth: int) -> str:
    parts = name.split(".", depth)
    return ".".join(parts[:depth] if len(parts) > depth else parts[:-1]) or name
