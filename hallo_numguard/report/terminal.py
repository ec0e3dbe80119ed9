"""Reports and traces as text for a terminal. Names come from untrusted files: no text is markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hallo_numguard.core.frames import PARTS, NonfiniteTensor
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, shape_in_words
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.report.inputs import NamedTrace, RankHistory, ReportInputs

_MAX_ROWS = 10
_MAX_RANKS = 4
_MAX_STEPS = 48  # characters of a sparkline
_MAX_NAME = 80  # characters
_LOGARITHMIC = ("loss scale", "norm", "absmax")
_COLOUR = {True: "yellow", False: "red", None: "magenta"}
_BARS = "▁▂▃▄▅▆▇█"


def render(inputs: ReportInputs) -> Group:
    """Returns a display for `rich.console.Console.print`: earlier steps in one line each, the last one in full."""
    return Group(*_overflows(inputs), *(part for trace in inputs.traces for part in _trace(trace)))


def panel(report: OverflowReport) -> Panel:
    """Returns one report, for `rich.console.Console.print`."""
    colour = _COLOUR[report.recoverable]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, sentences in report.rows():
        style = colour if label == "verdict" else ""
        table.add_row(label, Text("\n".join(sentences), style=style))
    when = f"after step {report.step}" if report.happened else f"step {report.step} {report.outcome}"
    title = Text(f" {when} at loss scale {report.loss_scale:g} ")
    return Panel(table, title=title, title_align="left", border_style=colour)


def sparkline(values: Sequence[float | None], logarithmic: bool = False) -> str:
    """Returns one character per value: a bar, × if it is not finite, a space if there is none.

    Args:
        values: Values in order.
        logarithmic: Whether powers of two are evenly spaced; values up to 0 have the lowest bar.
    """
    heights = [_height(value, logarithmic) for value in values]
    finite = [height for height in heights if height is not None and math.isfinite(height)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(
        " " if value is None or height is None else _bar(height, low, high) if math.isfinite(value) else "×"
        for value, height in zip(values, heights, strict=True)
    )


def _height(value: float | None, logarithmic: bool) -> float | None:
    if value is None or not math.isfinite(value) or not logarithmic:
        return value
    return math.log2(value) if value > 0 else -math.inf


def _bar(height: float, low: float, high: float) -> str:
    if not math.isfinite(height) or high == low:
        return _BARS[0]
    # Halved before they are subtracted: the difference of two finite numbers may be infinite.
    return _BARS[round((height / 2 - low / 2) / (high / 2 - low / 2) * (len(_BARS) - 1))]


def _overflows(inputs: ReportInputs) -> Iterator[RenderableType]:
    if not inputs.overflows:
        return
    *earlier, last = inputs.overflows
    for overflow in earlier[-_MAX_ROWS:]:
        yield Text(overflow.report.headline(), style="dim")
    yield panel(last.report)
    for sentence in last.hides_nan():
        yield Text(f"Beware: {harmless(sentence)}", style="yellow")
    if last.report.offenders:
        yield _offenders(last.report.offenders)
    histories = inputs.histories()
    if histories:
        yield _histories(histories)


def _offenders(offenders: Sequence[Offender]) -> Table:
    table = _table("offenders, in the order in which their gradients became ready", len(offenders))
    for name in ("name", "first at", "non-finite", "of", "shape", "dtype", "rank"):
        table.add_column(name, overflow="fold")
    for one in offenders[:_MAX_ROWS]:
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
    table = _table("last steps (× not finite; a skipped step has a - below it)", len(histories), _MAX_RANKS)
    for name in ("rank", "figure", "history", "last", "highest"):
        table.add_column(name, no_wrap=name != "rank")
    for history in histories[:_MAX_RANKS]:
        shown = replace(history, steps=history.steps[-_MAX_STEPS:])
        label, steps = shown.label, shown.steps
        for name, values in shown.series():
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
        title=Text(f" trace {harmless(named.source, _MAX_NAME)}: {calls} "),
        title_align="left",
        border_style="green" if origin is None else "red",
    )
    bad = list(trace.nonfinite_tensors())
    if bad:
        yield _tensors(bad)


def _tensors(bad: Sequence[NonfiniteTensor]) -> Table:
    table = _table("tensors that are not finite: forward in the order of calls, then gradients back", len(bad))
    for name in ("module", "call", "what", "tensor", "first at", "non-finite", "shape", "dtype"):
        table.add_column(name, overflow="fold")
    for frame, part, tensor in bad[:_MAX_ROWS]:
        where = (frame.name or "the root module", frame.call, PARTS[part], tensor.name, _index(tensor.index))
        table.add_row(*_cells(*where, tensor.counts, shape_in_words(tensor.shape), tensor.dtype))
    return table


def _table(title: str, rows: int, shown: int = _MAX_ROWS) -> Table:
    more = f"; {shown} of {rows} are shown" if rows > shown else ""
    return Table(title=title + more, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _cells(*values: object) -> Iterator[Text]:
    """Returns the values as text without markup."""
    return (Text(harmless(str(value), _MAX_NAME)) for value in values)


def _index(index: Iterable[int]) -> str:
    return ", ".join(map(str, index))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
