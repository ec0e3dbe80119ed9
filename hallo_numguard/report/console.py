"""A report as a panel in a terminal. Names come from files that nobody has checked, so nothing is read as markup."""

from __future__ import annotations

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hallo_numguard.core.overflow_report import OverflowReport, outcome, rows

_COLOUR = {True: "yellow", False: "red", None: "magenta"}


def panel(report: OverflowReport) -> Panel:
    """Returns the report, ready for `rich.console.Console.print`."""
    colour = _COLOUR[report.recoverable]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, sentences in rows(report):
        style = colour if label == "verdict" else ""
        table.add_row(label, Text("\n".join(sentences), style=style))
    title = Text(f" step {report.step} {outcome(report)} at loss scale {report.loss_scale:g} ")
    return Panel(table, title=title, title_align="left", border_style=colour)
