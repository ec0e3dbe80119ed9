"""`hallo-numguard report`."""

from __future__ import annotations

from pathlib import Path

import click

from hallo_numguard.cli import _shared as shared
from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.errors import NumGuardError

_EXIT_CODES = {0: "the report was made, whatever it says", 2: "a file could not be read or written"}


@click.command(
    "report",
    epilog=shared.epilog(
        "report dump/overflow-*.json",
        "report dump/*.json trace.jsonl.gz --html report.html --perfetto timeline.json",
        exit_codes=_EXIT_CODES,
    ),
)
@click.argument("files", nargs=-1, required=True, type=shared.PATH)
@click.option("--html", type=shared.PATH, help="Also write a page that works offline.")
@click.option("--perfetto", type=shared.PATH, help="Also write a timeline for ui.perfetto.dev.")
@shared.format_option
def command(files: tuple[Path, ...], html: Path | None, perfetto: Path | None, style: str) -> int:
    """Show overflow reports and traces. Needs no torch.

    FILES are reports that the guard wrote into its dump_dir, one a rank, and traces that were saved, in any order.
    """
    from hallo_numguard.report import inputs as reading
    from hallo_numguard.report import merged_json, terminal
    from hallo_numguard.report import perfetto as timeline
    from hallo_numguard.report.html import render as page

    inputs = reading.read(files)
    for path, renderer in ((html, page), (perfetto, timeline)):
        if path is not None:
            _write(path, renderer.render(inputs))
    if style == "json":
        click.echo(merged_json.render(inputs))
    else:
        from rich.console import Console

        Console(highlight=False).print(terminal.render(inputs))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise NumGuardError(f"{path} cannot be written: {error.strerror}") from error
