"""What the benchmarks' command lines share: options, tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WIDTH = 176  # columns of output that does not go to a terminal

_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))

json_option = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for machine and figures."
)
quick_option = click.option("--quick", is_flag=True, help="Less of everything: to see that it works.")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What trains."
)
rounds_option = click.option("--rounds", type=click.IntRange(min=1), help="Samples of each candidate.")


def make_console() -> Console:
    """Returns a console for stdout, wide enough for the tables where that is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Prints a line a fact."""
    for name, value in facts.items():
        console.print(f"[bold]{escape(name)}[/bold]: {escape(value)}", highlight=False)


def print_table(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: text in the first column, numbers in the others."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(headings):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*map(escape, cells))
    console.print(table)


def write_json(path: Path | None, machine: Mapping[str, str], results: Iterable[Any]) -> None:
    """Writes the results, which are dataclasses, if a path is given."""
    if path is not None:
        document = {"machine": machine, "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def size_label(size: int) -> str:
    """Returns a size as people write it."""
    unit, name = next((unit, name) for unit, name in _UNITS if size >= unit or unit == KIB)
    return f"{size / unit:g} {name}"
