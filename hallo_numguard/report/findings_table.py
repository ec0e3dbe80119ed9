"""The findings of a check of files, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hallo_numguard.core.findings import PreflightReport
from hallo_numguard.core.safe_text import harmless

_MAX_FINDINGS = 50  # JSON has all
_MAX_NAMES = 10  # of files that were not read
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def render(report: PreflightReport) -> Group:
    """Returns a display for `rich.console.Console.print`, errors first."""
    table = Table.grid(padding=(0, 1))
    shown = report.findings[:_MAX_FINDINGS]
    for number, finding in enumerate(shown):
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), Text(harmless(finding.message)))
        is_repeated = [after.remedy for after in shown[number + 1 : number + 2]] == [finding.remedy]
        if finding.remedy and not is_repeated:  # once under all lines that share it
            table.add_row("", Text(harmless(finding.remedy), style="dim"))
    return Group(*([table] if report.findings else []), *_lines(report))


def _lines(report: PreflightReport) -> Iterator[Text]:
    if len(report.findings) > _MAX_FINDINGS:
        yield Text(f"and {len(report.findings) - _MAX_FINDINGS} findings more, which --format json shows")
    for sentence in report.checked:
        yield Text(harmless(sentence))
    for sentence in report.unchecked:
        yield Text(f"Not checked: {harmless(sentence)}", style="yellow")
    if report.not_read:
        yield Text(f"Not read: {harmless(_listed(report.not_read))}")
    if report.ok:
        yield Text("Nothing was found in what was read." if report.not_read else "Nothing was found.", style="green")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
