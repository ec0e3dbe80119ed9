"""Writes the tables of docs/benchmarks.md from the figures in docs/figures.

    python benchmarks/page.py

The figures are what the benchmarks write with --json. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"

_TABLE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A row for each value of `label`, in order of appearance.

    Attributes:
        file: Name of the file, without suffix.
        label: Format of the first cell.
        cells: Formats of the other cells by heading, which is a format as well: figures may share a row.
        shown: Whether a figure is in the table.
        key: List of the file that has the figures.
    """

    file: str
    label: str
    cells: dict[str, str]
    shown: Callable[[Row], bool] = lambda _: True
    key: str = "results"

    def render(self) -> str:
        """Returns the table as Markdown."""
        found = json.loads((DOCS / "figures" / f"{self.file}.json").read_text(encoding="utf-8"))[self.key]
        headings: dict[str, None] = {}
        rows: dict[str, dict[str, str]] = {}
        for figures in filter(self.shown, found):
            row = rows.setdefault(self.label.format(**figures), {})
            for heading, cell in self.cells.items():
                headings[heading.format(**figures)] = None
                row[heading.format(**figures)] = _formatted(cell, figures)
        lines = [["", *headings], ["---"] * (1 + len(headings))]
        lines += [[label, *(row.get(heading, "") for heading in headings)] for label, row in rows.items()]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _formatted(cell: str, figures: Row) -> str:
    """A dash where there is no figure."""
    try:
        return cell.format(**figures)
    except TypeError:  # None has no digits
        return "-"


def _large_or_cached(sample: Row) -> bool:
    size_and_dtype = sample["size"] >> 20, sample["dtype"]
    return sample["threads"] == 1 and (size_and_dtype[0] == 256 or size_and_dtype == (4, "fp32"))


TABLES = {
    "statistics": Table("overhead", "{label}", {"{size:,} B, {dtype}": "{fraction:#.2g}"}, _large_or_cached, "samples"),
    "scan-warm": Table(
        "scan",
        "{candidate}",
        {"{threads}T": "{fraction:.2f}", "{threads}T, GB/s": "{gb_per_s:.1f}"},
        lambda row: not row["cold"],
    ),
    "scan-cold": Table("scan", "{candidate}", {"{threads}T": "{fraction:.2f}"}, lambda row: bool(row["cold"])),
    "deepspeed": Table(
        "deepspeed_step",
        "{case}",
        {
            "step ms": "{step_ms:.0f}",
            "observe": "{observe:.3f}",
            "replace": "{replace:.3f}",
            "DeepSpeed's check and norm ms": "{theirs_ms:.1f}",
            "guard ms": "{ours_ms:.1f}",
        },
        lambda row: "x64" not in row["case"],
    ),
    "parameters": Table(
        "deepspeed_step",
        "{case}",
        {"DeepSpeed's check and norm ms": "{theirs_ms:.3g}", "guard ms": "{ours_ms:.2f}"},
        lambda row: "x64" in row["case"],
    ),
    "trace": Table(
        "trace",
        "{way}",
        {"{model}, ms more": "{overhead:.1f}", "{model}, over the trace's": "{ratio:.1f}"},
        lambda row: row["way"] != "plain",
    ),
    "optimizer": Table(
        "optimizer_step",
        "{case}",
        {
            "torch ms": "{torch_ms:.1f}",
            **{way: f"{{ratios[{way}]:.3f}}" for way in ("step", "guard", "guard, clips", "guard, within")},
        },
    ),
}


def render(text: str) -> str:
    """Returns the page with its tables made anew."""
    return _TABLE.sub(lambda found: f"{found['begin']}{TABLES[found['name']].render()}{found['end']}", text)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
