"""Options, progress and output that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from hallo_numguard.core.findings import PreflightReport

PATH = click.Path(path_type=Path)

EXIT_CODES = {
    0: "nothing found, or for information only",
    1: "a warning or an error was found",
    2: "something could not be checked",
}

format_option = click.option(
    "--format", "style", type=click.Choice(["human", "json"]), default="human", help="Text, or one JSON document."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), show_default="number of CPUs", help="Reader threads."
)
dtype_option = click.option(
    "--dtype", show_default="from the configuration", help="Training dtype of the weights, such as float16."
)
manifest_option = click.option(
    "--manifest", "listing", type=PATH, show_default="beside the files", help="Manifest, or list of checksums."
)


def epilog(*examples: str, exit_codes: Mapping[int, str] = EXIT_CODES) -> str:
    """Returns the end of a help text: examples and exit codes.

    Args:
        *examples: Arguments of `hallo-numguard`.
        exit_codes: Meaning of each exit code but 130.
    """
    lines = ["Examples:", *(f"  hallo-numguard {example}" for example in examples)]
    codes = [f"  {code:<3}  {meaning}" for code, meaning in {**exit_codes, 130: "interrupted"}.items()]
    return "\n".join(["\b", *lines, "", "\b", "Exit codes:", *codes])  # \b: click keeps the line breaks


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on stderr if that is a terminal. Yields a function of bytes just read and total bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, advance=done, total=total)


def print_findings(found: PreflightReport, style: str) -> int:
    """Prints a report; returns the exit code."""
    if style == "json":
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        from rich.console import Console

        from hallo_numguard.report import findings_table

        Console(highlight=False).print(findings_table.render(found))
    return found.exit_code
