"""Reports and traces as text for a terminal: what `hallo-numguard report` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hallo_numguard.core.environment import hides_nan
from hallo_numguard.core.overflow_report import headline
from hallo_numguard.core.records import Offender, shape_in_words
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.report.calls import PARTS, NonfiniteTensor, nonfinite_tensors
from hallo_numguard.report.console import panel
from hallo_numguard.report.history import RankHistory, by_rank, series
from hallo_numguard.report.inputs import Material, NamedTrace, Overflow
from hallo_numguard.report.sparkline import sparkline

_MOST_ROWS = 10
_MOST_RANKS = 4
_MOST_STEPS = 48  # characters of a sparkline
_NAME = 80  # characters
_LOGARITHMIC = ("loss scale", "norm", "absmax")


def render(material: Material) -> Group:
    """Returns all of it, ready for `rich.console.Console.print`: earlier steps in a line each, the last one in full."""
    return Group(*_overflows(material.overflows), *(part for trace in material.traces for part in _trace(trace)))


def _overflows(overflows: Sequence[Overflow]) -> Iterator[RenderableType]:
    if not overflows:
        return
    *earlier, last = overflows
    for overflow in earlier[-_MOST_ROWS:]:
        yield Text(headline(overflow.report), style="dim")
    yield panel(last.report)
    for sentence in dict.fromkeys(s for item in last.ranks for s in hides_nan(item.report.environment)):
        yield Text(f"Beware: {harmless(sentence)}", style="yellow")
    if last.report.offenders:
        yield _offenders(last.report.offenders)
    histories = by_rank(overflows)
    if histories:
        yield _histories(histories)


def _offenders(offenders: Sequence[Offender]) -> Table:
    table = _table("offenders, in the order in which their gradients became ready", len(offenders))
    for name in ("name", "first at", "non-finite", "of", "shape", "dtype", "rank"):
        table.add_column(name, overflow="fold")
    for one in offenders[:_MOST_ROWS]:
        table.add_row(
            *_cells(
                one.name,
                _index(one.index),
                one.counts,
                one.numel,
                shape_in_words(one.shape),
                one.dtype,
                "all" if one.rank is None else one.rank,
            )
        )
    return table


def _histories(histories: Sequence[RankHistory]) -> Table:
    table = _table("last steps (× not finite; a skipped step has a - below it)", len(histories), _MOST_RANKS)
    for name in ("rank", "figure", "history", "last", "highest"):
        table.add_column(name, no_wrap=name != "rank")
    for history in histories[:_MOST_RANKS]:
        steps = history.steps[-_MOST_STEPS:]
        label = history.label
        for name, values in series(steps):
            finite = [value for value in values if value is not None and abs(value) < float("inf")]
            if finite:
                line = sparkline(values, name in _LOGARITHMIC)
                table.add_row(*_cells(label, name, line, _number(values[-1]), _number(max(finite))))
                label = ""
        applied = "".join(" " if step.applied else "-" for step in steps)
        table.add_row(*_cells(label, f"steps {steps[0].step} to {steps[-1].step}", applied, "", ""))
    return table


def _trace(named: NamedTrace) -> Iterator[RenderableType]:
    trace = named.trace
    calls = f"{len(trace.frames)} calls" + (f", {trace.dropped} before them not kept" if trace.dropped else "")
    origin = trace.first_nonfinite
    found = "everything stayed finite" if origin is None else f"first not finite: {origin}"
    yield Panel(
        Text(harmless(found)),
        title=Text(f" trace {harmless(named.source, _NAME)}: {calls} "),
        title_align="left",
        border_style="green" if origin is None else "red",
    )
    bad = list(nonfinite_tensors(trace))
    if bad:
        yield _tensors(bad)


def _tensors(bad: Sequence[NonfiniteTensor]) -> Table:
    table = _table("tensors that are not finite: forward in the order of calls, then gradients back", len(bad))
    for name in ("module", "call", "what", "tensor", "first at", "non-finite", "shape", "dtype"):
        table.add_column(name, overflow="fold")
    for frame, part, tensor in bad[:_MOST_ROWS]:
        where = (frame.name or "the root module", frame.call, PARTS[part], tensor.name, _index(tensor.index))
        table.add_row(*_cells(*where, tensor.counts, shape_in_words(tensor.shape), tensor.dtype))
    return table


def _table(title: str, rows: int, shown: int = _MOST_ROWS) -> Table:
    more = f"; {shown} of {rows} are shown" if rows > shown else ""
    return Table(title=title + more, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _cells(*values: object) -> Iterator[Text]:
    """The values as text that is not read as markup."""
    return (Text(harmless(str(value), _NAME)) for value in values)


def _index(index: Iterable[int]) -> str:
    return ", ".join(map(str, index))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
