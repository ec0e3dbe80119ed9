"""Contents of the HTML page, as values that JSON has. Names are without control characters, but not escaped yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from hallo_numguard.core import environment
from hallo_numguard.core.frames import PARTS, Frames
from hallo_numguard.core.records import Offender, StepRecord, shape_in_words
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.report.html.grid import MAX_COLUMNS, MAX_ROWS, Cell, Grid, bins, with_fewer_rows
from hallo_numguard.report.inputs import NamedTrace, Overflow, RankHistory, ReportInputs

_MAX_RANKS = 32  # in tables
_MAX_LINES = 8  # ranks in the timeline
_MAX_EARLIER = 200
_ROOT = "(root)"
_OUTLOOK = {True: "recovers", False: "unrecoverable", None: "unknown"}


def content(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the variables of the template; `figures` is for the page's script."""
    histories = inputs.histories()
    return {
        "title": _title(inputs),
        "banner": _banner(inputs.overflows),
        "earlier": [overflow.report.headline() for overflow in reversed(inputs.overflows[:-1])][:_MAX_EARLIER],
        "traces": list(map(_origin, inputs.traces)),
        "hides_nan": _hides_nan(inputs.overflows),
        "ranks": _ranks(inputs.overflows),
        "environment": _environment(inputs.overflows),
        "figures": {
            "timeline": _timeline(histories),
            "grids": list(_grids(inputs, histories)),
            "offenders": [
                list(map(harmless, row)) for row in (*_offenders(inputs.overflows), *_tensors(inputs.traces))
            ],
        },
    }


def _title(inputs: ReportInputs) -> str:
    if inputs.overflows:
        report = inputs.overflows[-1].report
        return f"Step {report.step}: {report.verdict}"
    return harmless(", ".join(trace.source for trace in inputs.traces), 100)


def _banner(overflows: Sequence[Overflow]) -> dict[str, Any] | None:
    if not overflows:
        return None
    report = overflows[-1].report
    ranks = f", {report.world_size} ranks" if report.world_size > 1 else ""
    in_a_row = f" ({report.consecutive_skips} in a row)" if report.consecutive_skips > 1 else ""
    when = f"After step {report.step}" if report.happened else f"Step {report.step} was {report.outcome}{in_a_row}"
    return {
        "outlook": _OUTLOOK[report.recoverable],
        "step": f"{when} at loss scale {report.loss_scale:g}{ranks}",
        "rows": report.rows(),
    }


def _origin(named: NamedTrace) -> dict[str, Any]:
    trace = named.trace
    dropped = f", {trace.dropped} before them were not kept" if trace.dropped else ""
    first = trace.first_nonfinite
    return {
        "source": harmless(named.source, 100),
        "calls": f"{len(trace.frames)} calls of modules{dropped}",
        "finite": first is None,
        "first": "Everything stayed finite." if first is None else harmless(str(first)),
    }


def _hides_nan(overflows: Sequence[Overflow]) -> list[str]:
    return list(dict.fromkeys(harmless(sentence) for overflow in overflows for sentence in overflow.hides_nan()))


# -- ranks -----------------------------------------------------------------------------------------------------------


def _ranks(overflows: Sequence[Overflow]) -> list[list[str]]:
    """Returns a row for every rank with a report of the last step, or with an offender in it."""
    if not overflows:
        return []
    last = overflows[-1]
    named = {one.rank for one in (last.report.first, *last.report.offenders) if one is not None}
    written = {item.rank for item in last.ranks}
    silent = sorted(rank for rank in named - written if rank is not None)
    table = [[harmless(item.label), *_last_step(item.report.history)] for item in last.ranks[:_MAX_RANKS]]
    table += [[f"rank {rank}", "", "", "", ""] for rank in silent[:_MAX_RANKS]]
    ranks = [item.rank for item in last.ranks[:_MAX_RANKS]] + list(silent[:_MAX_RANKS])
    return [[*row, _offenders_of(last, rank)] for row, rank in zip(table, ranks, strict=True)]


def _last_step(history: Sequence[StepRecord]) -> list[str]:
    if not history:
        return ["", "", "", ""]
    last = history[-1]
    loss = "" if last.loss is None else f"{last.loss:.6g}"
    return [loss, f"{last.norm:.6g}", f"{last.absmax:.6g}", str(last.nonfinite)]


def _offenders_of(overflow: Overflow, rank: int | None) -> str:
    report = overflow.report
    count = sum(one.rank == rank for one in report.offenders if rank is not None)
    first = "the first, " if report.first is not None and report.first.rank == rank and rank is not None else ""
    return f"{first}{count} gradients" if first or count else "none"


def _environment(overflows: Sequence[Overflow]) -> dict[str, Any]:
    """Returns facts by name, with a value for each rank of the last step."""
    if not overflows:
        return {"ranks": [], "rows": []}
    ranks = overflows[-1].ranks[:_MAX_RANKS]
    facts = [dict(environment.rows(item.report.environment)) for item in ranks]
    names = dict.fromkeys(name for fact in facts for name in fact if name != "rank")
    table = [[harmless(name, 100), *(harmless(fact.get(name, ""), 300) for fact in facts)] for name in names]
    return {"ranks": [harmless(item.label, 100) for item in ranks], "rows": table}


# -- figures ---------------------------------------------------------------------------------------------------------


def _timeline(histories: Sequence[RankHistory]) -> dict[str, Any] | None:
    if not histories:
        return None
    steps = {step.step: step for history in histories for step in history.steps}
    limits = [step.limit for step in steps.values() if step.limit is not None]
    return {
        "skipped": sorted(number for number, step in steps.items() if not step.applied),
        "limit": min(limits, default=None),
        "lines": [
            line
            for position, history in enumerate(histories[:_MAX_LINES])
            for line in _lines(history)
            if position == 0 or line["name"] != "loss scale"  # which all ranks share
        ],
    }


def _lines(history: RankHistory) -> Iterator[dict[str, Any]]:
    for name, values in history.series():
        bad = [step.step for step, value in zip(history.steps, values, strict=True) if _is_bad(value)]
        if bad or any(value is not None for value in values):
            yield {
                "name": name,
                "rank": harmless(history.label, 40),
                "steps": [step.step for step in history.steps],
                "values": list(map(_number, values)),
                "bad": bad,
            }


def _grids(inputs: ReportInputs, histories: Sequence[RankHistory]) -> Iterator[dict[str, Any]]:
    firsts = [report.first for report in (overflow.report for overflow in inputs.overflows) if report.first]
    if any(step.parameters for history in histories for step in history.steps):
        names = [one.name for one in firsts]
        yield _heat_map("Gradients by parameter and step", "step", _by_parameter(histories, names), names)
    if len(histories) > 1:
        yield _heat_map("Gradients by rank and step", "step", _by_rank(histories))
    for named in inputs.traces:
        if named.trace.frames:
            title = f"Calls of modules in {harmless(named.source, 60)}"
            names = _first_module(named.trace)
            yield _heat_map(title, "call", _by_module(named, names), names)


def _steps_as_columns(histories: Sequence[RankHistory]) -> tuple[list[str], dict[int, int]]:
    numbers = sorted({step.step for history in histories for step in history.steps})
    labels, column = bins(list(map(str, numbers)), MAX_COLUMNS)
    return labels, dict(zip(numbers, column, strict=True))


def _by_parameter(histories: Sequence[RankHistory], first: Sequence[str]) -> Grid:
    labels, column = _steps_as_columns(histories)
    grid = Grid(labels)
    for history in histories:
        for step in history.steps:
            for name, record in step.parameters.items():
                grid.add(name, column[step.step], Cell(record.absmax, record.nonfinite))
    return with_fewer_rows(grid, first)


def _by_rank(histories: Sequence[RankHistory]) -> Grid:
    labels, column = _steps_as_columns(histories)
    grid = Grid(labels)
    for history in histories[:MAX_ROWS]:
        for step in history.steps:
            grid.add(history.label, column[step.step], Cell(step.absmax, step.nonfinite))
    return grid


def _first_module(trace: Frames) -> list[str]:
    """Returns the row of the module of the first non-finite tensor; [] if its call was not kept."""
    first = trace.first_nonfinite
    return [frame.name or _ROOT for frame in trace.frames if first is not None and frame.position == first.position]


def _by_module(named: NamedTrace, first: Sequence[str]) -> Grid:
    frames = named.trace.frames
    parts = [part for part in PARTS if any(getattr(frame, part) for frame in frames)]
    calls = sorted({frame.call for frame in frames})
    labels, column = bins([f"call {call}" for call in calls], max(1, MAX_COLUMNS // len(parts)) if parts else 1)
    place = dict(zip(calls, column, strict=True))
    grid = Grid([f"{label}: {PARTS[part]}" for label in labels for part in parts])
    for frame in frames:
        for part, tensor in frame.tensors():
            at = place[frame.call] * len(parts) + parts.index(part)
            record = tensor.record
            infinite = record.pos_inf + record.neg_inf
            grid.add(frame.name or _ROOT, at, Cell(record.absmax, record.nonfinite, infinite))
    return with_fewer_rows(grid, first)


def _heat_map(title: str, columns: str, grid: Grid, first: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "title": title,
        "what": columns,
        "columns": grid.columns,
        "rows": list(map(harmless, grid.rows)),
        "absmax": [[None if cell is None else _number(cell.absmax) for cell in row] for row in grid.rows.values()],
        "marks": [
            [row, column, cell.mark, cell.nonfinite]
            for row, cells in enumerate(grid.rows.values())
            for column, cell in enumerate(cells)
            if cell is not None and cell.nonfinite
        ],
        "first": [row for row, name in enumerate(grid.rows) if name in first],
        "note": grid.note,
    }


# -- offenders -------------------------------------------------------------------------------------------------------


def _offenders(overflows: Sequence[Overflow]) -> Iterator[list[str]]:
    """Yields the offenders of all steps, the last step's first."""
    for overflow in reversed(overflows):
        report = overflow.report
        first = [] if report.first is None or report.first in report.offenders else [report.first]
        for one in (*first, *report.offenders):
            yield _offender(f"step {report.step}", one)


def _offender(where: str, one: Offender) -> list[str]:
    rank = "all" if one.rank is None else str(one.rank)
    return [where, one.kind, one.name, *_found(one.index, one.counts, one.absmax, one.shape, one.dtype), rank]


def _tensors(traces: Sequence[NamedTrace]) -> Iterator[list[str]]:
    for named in traces:
        for frame, part, tensor in named.trace.nonfinite_tensors():
            found = _found(tensor.index, tensor.counts, tensor.record.absmax, tensor.shape, tensor.dtype)
            name = f"{frame.name or _ROOT}: {tensor.name}"
            yield [f"{named.source}, call {frame.call}", PARTS[part], name, *found, ""]


def _found(index: Sequence[int], counts: str, absmax: float, shape: Sequence[int], dtype: str) -> list[str]:
    return [", ".join(map(str, index)), counts, f"{absmax:.6g}", shape_in_words(shape), dtype]


def _is_bad(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _number(value: float | None) -> float | None:
    """Returns a number with five digits; None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
