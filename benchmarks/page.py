"""The tables of the benchmarks, on the terminal and in docs/benchmarks.md, whose figures lie in docs/figures.

    python benchmarks/page.py

The figures are what the benchmarks write with --json. A table stands between `<!-- table: NAME -->` and `<!-- end -->`
in the page, and is made anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from output import print_table, size_label
from rich.console import Console

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

    def lines(self, found: Iterable[Row]) -> list[list[str]]:
        """Returns the headings, and a line for each value of the label."""
        headings: dict[str, None] = {}
        rows: dict[str, dict[str, str]] = {}
        for figures in filter(self.shown, found):
            if "size" in figures:
                figures = {**figures, "size": size_label(figures["size"])}
            row = rows.setdefault(self.label.format(**figures), {})
            for heading, cell in self.cells.items():
                headings[heading.format(**figures)] = None
                row[heading.format(**figures)] = _formatted(cell, figures)
        return [["", *headings], *([label, *(row.get(name, "") for name in headings)] for label, row in rows.items())]

    def markdown(self) -> str:
        """Returns the table of the page."""
        found = json.loads((DOCS / "figures" / f"{self.file}.json").read_text(encoding="utf-8"))
        headings, *rows = self.lines(found[self.key])
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, ["---"] * len(headings), *rows))


def _formatted(cell: str, figures: Row) -> str:
    """A dash where there is no figure."""
    try:
        return cell.format(**figures)
    except TypeError:  # None has no digits
        return "-"


def _in_statistics(sample: Row) -> bool:
    size, dtype = sample["size"] >> 20, sample["dtype"]
    return sample["threads"] == 1 and sample["kind"] != "limit" and (size == 256 or (size, dtype) == (4, "fp32"))


def _in_statistics_by_size(sample: Row) -> bool:
    return sample["threads"] == 1 and sample["kind"] != "limit" and sample["size"] >> 20 in (4, 256)


def _in_gpu_statistics(sample: Row) -> bool:
    size, dtype = sample["size"] >> 20, sample["dtype"]
    return sample["kind"] != "limit" and (size == 1024 or (size, dtype) in ((1, "fp32"), (16, "fp32"), (256, "fp32")))


_STATISTICS = ("{label}", {"{size}, {dtype}": "{fraction:#.2g}"})

_GUARDED_STEPS = (
    "{case}",
    {
        "step ms": "{step_ms:.0f}",
        "observe": "{observe:.3f}",
        "replace": "{replace:.3f}",
        "DeepSpeed's check and norm ms": "{theirs_ms:.1f}",
        "guard ms": "{ours_ms:.1f}",
    },
)
_OPTIMIZER_STEPS = (
    "{case}",
    {
        "torch ms": "{torch_ms:.4g}",
        **{way: f"{{ratios[{way}]:.3f}}" for way in ("step", "guard", "guard, clips", "guard, within")},
    },
)

TABLES = {
    "statistics": Table("overhead", *_STATISTICS, _in_statistics, "samples"),
    "statistics-avx2": Table("overhead_avx2", *_STATISTICS, _in_statistics_by_size, "samples"),
    "scan-warm": Table(
        "scan",
        "{candidate}",
        {"{threads}T": "{fraction:.2f}", "{threads}T, GB/s": "{gb_per_s:.1f}"},
        lambda row: not row["cold"],
    ),
    "scan-cold": Table("scan", "{candidate}", {"{threads}T": "{fraction:.2f}"}, lambda row: bool(row["cold"])),
    "statistics-h100": Table("overhead_h100", *_STATISTICS, _in_gpu_statistics, "samples"),
    "guarded-steps": Table("deepspeed_step", *_GUARDED_STEPS, lambda row: "x64" not in row["case"]),
    "guarded-steps-h100": Table("deepspeed_step_h100", *_GUARDED_STEPS),
    "guarded-steps-by-parameters": Table(
        "deepspeed_step",
        "{case}",
        {"DeepSpeed's check and norm ms": "{theirs_ms:.3g}", "guard ms": "{ours_ms:.2f}"},
        lambda row: "x64" in row["case"],
    ),
    "parameter-costs": Table(
        "parameter_cost",
        "{case}",
        {
            "DeepSpeed's check and norm us a parameter": "{theirs_us:.3f}",
            "guard us a parameter": "{guard_us:.3f}",
            "of it listing gradients": "{listing_us:.3f}",
        },
    ),
    "forward-passes": Table(
        "trace",
        "{way}",
        {"{model}, ms more": "{overhead:.3g}", "{model}, ratio": "{ratio:.2g}"},
        lambda row: row["way"] != "plain",
    ),
    "optimizer-steps": Table("optimizer_step", *_OPTIMIZER_STEPS),
    "optimizer-steps-h100": Table("optimizer_step_h100", *_OPTIMIZER_STEPS),
}


def print_results(console: Console, file: str, results: Sequence[Any]) -> None:
    """Prints the tables of a file that have any of the results, which are dataclasses."""
    for name, table in TABLES.items():
        headings, *rows = table.lines(map(asdict, results)) if table.file == file else [[]]
        if rows:
            print_table(console, name.replace("-", " ").capitalize(), headings, rows)


def render(text: str) -> str:
    """Returns the page with its tables made anew."""
    return _TABLE.sub(lambda found: f"{found['begin']}{TABLES[found['name']].markdown()}{found['end']}", text)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
