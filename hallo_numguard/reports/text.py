"""A report as plain text: what a tired human reads in a log or a traceback."""

from __future__ import annotations

import textwrap

from hallo_numguard.records import OverflowReport, Verdict
from hallo_numguard.reports.names import harmless

_WIDTH = 110
_MOST_OFFENDERS = 3
_MEANING = {
    True: "training will go on by itself",
    False: "no loss scale can mend this",
    None: "it may come back",
}


def happened(report: OverflowReport) -> str:
    """Returns what became of the step: "skipped", as it should be, or "applied all the same"."""
    return "skipped" if report.consecutive_skips else "applied all the same"


def headline(report: OverflowReport) -> str:
    """Returns one line: what happened, where, and what it means."""
    what = f"step {report.step} was {happened(report)}: {report.verdict}"
    where = "" if report.first is None else f", {report.first}"
    return harmless(f"{what}{where} [loss scale {report.loss_scale:g}]")


def rows(report: OverflowReport) -> list[tuple[str, list[str]]]:
    """Returns the report as labelled rows of sentences, for any kind of display: names in them are harmless."""
    return [(label, list(map(harmless, sentences))) for label, sentences in _rows(report)]


def _rows(report: OverflowReport) -> list[tuple[str, list[str]]]:
    provisional = ", provisional" if report.provisional else ""
    meaning = "cause not proved" if report.verdict is Verdict.UNDETERMINED else _MEANING[report.recoverable]
    verdict = f"{report.verdict} ({meaning}{provisional})"
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
    scale = f"loss scale {report.loss_scale:g}{ranks}"
    lines = [f"Step {report.step} was {happened(report)}, its gradients are not finite ({scale})."]
    for label, sentences in rows(report):
        for position, sentence in enumerate(sentences):
            lead = f"  {label if position == 0 else '':<12}"
            lines.append(textwrap.fill(sentence, _WIDTH, initial_indent=lead, subsequent_indent=" " * 14))
    return "\n".join(lines)
