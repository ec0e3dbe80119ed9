"""A report as plain text: what a tired human reads in a log or a traceback."""

from __future__ import annotations

import textwrap

from hallo_numguard.records import OverflowReport
from hallo_numguard.reports.names import harmless

_WIDTH = 110
_MOST_OFFENDERS = 3
_MEANING = {
    True: "training will go on by itself",
    False: "no loss scale can mend this",
    None: "cause not proved",
}


def headline(report: OverflowReport) -> str:
    """Returns one line: what happened, where, and what it means."""
    what = f"step {report.step} was skipped: {report.verdict}"
    where = "" if report.first is None else f", {report.first}"
    return harmless(f"{what}{where} [loss scale {report.loss_scale:g}]")


def rows(report: OverflowReport) -> list[tuple[str, list[str]]]:
    """Returns the report as labelled rows of sentences, for any kind of display: names in them are harmless."""
    return [(label, list(map(harmless, sentences))) for label, sentences in _rows(report)]


def _rows(report: OverflowReport) -> list[tuple[str, list[str]]]:
    provisional = ", provisional" if report.provisional else ""
    verdict = f"{report.verdict} ({_MEANING[report.recoverable]}{provisional})"
    table = [("verdict", [verdict])]
    if report.first is not None:
        table.append(("first", [str(report.first)]))
    table.append(("evidence", list(report.evidence)))
    if report.not_checked:
        table.append(("not checked", ["; ".join(report.not_checked)]))
    others = [item for item in report.offenders if item != report.first]
    if others:
        shown = [str(item) for item in others[:_MOST_OFFENDERS]]
        if len(others) > _MOST_OFFENDERS:
            shown.append(f"... and {len(others) - _MOST_OFFENDERS} more")
        table.append(("gradients", shown))
    table.append(("what to do", [report.advice]))
    return table


def render(report: OverflowReport) -> str:
    """Returns the whole report, wrapped to a terminal's width."""
    ranks = f", {report.world_size} ranks" if report.world_size > 1 else ""
    lines = [f"Step {report.step} was skipped, its gradients are not finite (loss scale {report.loss_scale:g}{ranks})."]
    for label, sentences in rows(report):
        for position, sentence in enumerate(sentences):
            lead = f"  {label if position == 0 else '':<12}"
            lines.append(textwrap.fill(sentence, _WIDTH, initial_indent=lead, subsequent_indent=" " * 14))
    return "\n".join(lines)
