"""Heat maps as numbers: rows of cells, made fewer where there are more than anybody could look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_ROWS = 2000
MOST_COLUMNS = 120
_DEEPEST = 12  # parts of a name that are looked at to group rows
_NOT_A_NUMBER = "×"
_INFINITE = "∞"


class Cell(NamedTuple):
    """What one cell shows.

    Attributes:
        absmax: Largest absolute value among the finite elements.
        nonfinite: Number of the others.
        infinite: How many of these are known to be infinite.
    """

    absmax: float
    nonfinite: int = 0
    infinite: int = 0

    @property
    def mark(self) -> str:
        """× where there may be NaN, ∞ where there are infinities only, "" where all is finite."""
        if not self.nonfinite:
            return ""
        return _INFINITE if self.infinite == self.nonfinite else _NOT_A_NUMBER


def together(one: Cell | None, other: Cell | None) -> Cell | None:
    """Returns a cell for the elements of two."""
    if one is None or other is None:
        return one or other
    return Cell(max(one.absmax, other.absmax), one.nonfinite + other.nonfinite, one.infinite + other.infinite)


@dataclass
class Grid:
    """Rows by name, with a cell or nothing for each column.

    Attributes:
        columns: Their labels.
        rows: Cells by the row's name.
        note: What was left out or put together, in a sentence; "" if nothing was.
    """

    columns: list[str]
    rows: dict[str, list[Cell | None]] = field(default_factory=dict)
    note: str = ""

    def add(self, name: str, column: int, cell: Cell) -> None:
        """Puts a cell in, together with what is there already."""
        row = self.rows.setdefault(name, [None] * len(self.columns))
        row[column] = together(row[column], cell)


def bins(labels: Sequence[str], most: int) -> tuple[list[str], list[int]]:
    """Puts neighbouring columns together where there are more than `most`.

    Returns:
        The labels of what is left, and for each column that there was the one that it is in now.
    """
    width = math.ceil(len(labels) / most) or 1
    starts = range(0, len(labels), width)
    parts = [labels[start : start + width] for start in starts]
    left = [part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return left, [position // width for position in range(len(labels))]


def with_fewer_rows(grid: Grid, first: Iterable[str] = (), most: int = MOST_ROWS) -> Grid:
    """Returns a grid of at most `most` rows: those of the same module become one, but for those that are not finite.

    Args:
        grid: Any.
        first: Rows that stay on their own before any others.
        most: One half for rows on their own, the other for modules.
    """
    if len(grid.rows) <= most:
        return grid
    bad = [name for name, row in grid.rows.items() if any(cell is not None and cell.nonfinite for cell in row)]
    wanted = dict.fromkeys([*(name for name in first if name in grid.rows), *bad])
    alone = set(list(wanted)[: most // 2])
    depth = _depth([name for name in grid.rows if name not in alone], most // 2)
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
        total = [together(one, other) for one, other in zip(total, row, strict=True)]
    return total


def _depth(names: Sequence[str], most: int) -> int:
    """How many parts of the names make at most so many different prefixes; 0 if even one makes more."""
    for depth in range(_DEEPEST, 0, -1):
        if len({_prefix(name, depth) for name in names}) <= most:
            return depth
    return 0


def _prefix(name: str, depth: int) -> str:
    parts = name.split(".", depth)
    return ".".join(parts[:depth] if len(parts) > depth else parts[:-1]) or name
