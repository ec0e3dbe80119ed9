"""Traces and histories as a timeline in Chrome's trace format, for ui.perfetto.dev and chrome://tracing.

Nothing is timed. In a trace every innermost call is one unit of time long, so that the timeline shows order and
nesting; the backward pass follows the forward pass, in reverse. In a history every step is one unit long.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hallo_numguard.core.frames import Frame, Frames, TensorRecord
from hallo_numguard.core.records import shape_in_words
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.report.inputs import NamedTrace, RankHistory, ReportInputs

Event = dict[str, Any]

_UNIT = 1000  # microseconds
_MAX_NAME = 200  # characters
_FORWARD, _BACKWARD = 1, 2  # threads
_FORWARD_PARTS = ("inputs", "weights", "outputs")
_BACKWARD_PARTS = ("grad_outputs", "grad_inputs", "grad_weights")


def render(inputs: ReportInputs) -> str:
    """Returns the timeline as a JSON document."""
    return json.dumps(timeline(inputs), allow_nan=False)


def timeline(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the timeline as values that JSON has: one process per rank, then one per trace."""
    events: list[Event] = []
    histories = inputs.histories()
    for process, history in enumerate(histories):
        events.extend(_steps(history, process))
    for process, trace in enumerate(inputs.traces, len(histories)):
        events.extend(_calls(trace, process))
    note = "order, not duration: nothing was timed"
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"time": note}}


def _steps(history: RankHistory, process: int) -> Iterator[Event]:
    yield _label(process, "process_name", history.label)
    yield _label(process, "thread_name", "optimizer steps", _FORWARD)
    start = history.steps[0].step
    for step in history.steps:
        skipped = "" if step.applied else " (skipped)"
        yield {
            **_slice(f"step {step.step}{skipped}", process, _FORWARD, (step.step - start) * _UNIT, _UNIT),
            "args": {"loss_scale": _number(step.loss_scale), "nonfinite": step.nonfinite, "loss": _number(step.loss)},
        }
    for name, values in history.series():
        for step, value in zip(history.steps, values, strict=True):
            if value is not None and math.isfinite(value):
                at = (step.step - start) * _UNIT
                yield {"name": name, "ph": "C", "ts": at, "pid": process, "args": {name: value}}


class _Span(NamedTuple):
    """Begin and end of a call, in units."""

    begin: int
    end: int


def _calls(named: NamedTrace, process: int) -> Iterator[Event]:
    trace = named.trace
    yield _label(process, "process_name", f"trace {named.source}")
    yield _label(process, "thread_name", "forward", _FORWARD)
    yield _label(process, "thread_name", "backward", _BACKWARD)
    spans = _spans(trace.frames)
    last = max((span.end for span in spans.values()), default=0)
    for frame in trace.frames:
        forward = spans[frame.position]
        yield _call(frame, process, _FORWARD, forward, _FORWARD_PARTS)
        if any(getattr(frame, part) for part in _BACKWARD_PARTS):
            # The backward pass begins with the last call.
            backward = _Span(2 * last - forward.end, 2 * last - forward.begin)
            yield _call(frame, process, _BACKWARD, backward, _BACKWARD_PARTS)
    yield from _origin(trace, process, spans, last)


def _spans(frames: Sequence[Frame]) -> dict[int, _Span]:
    """Returns every call's span by its position: a call without inner calls is one unit long."""
    begun: dict[int, int] = {}  # by the position of a parent, which is completed after its children
    spans: dict[int, _Span] = {}
    now = 0
    for frame in frames:
        begin = begun.pop(frame.position, now)
        now = max(now, begin + 1)
        spans[frame.position] = _Span(begin, now)
        if frame.parent is not None:
            begun[frame.parent] = min(begin, begun.get(frame.parent, begin))
    return spans


def _call(frame: Frame, process: int, thread: int, span: _Span, parts: Sequence[str]) -> Event:
    name = f"{frame.name or 'the root module'} ({frame.cls})"
    tensors = [(part, tensor) for part, tensor in frame.tensors() if part in parts]
    event = _slice(name, process, thread, span.begin * _UNIT, (span.end - span.begin) * _UNIT)
    event["args"] = {
        "call": frame.call,
        **{harmless(f"{part}: {tensor.name}", _MAX_NAME): _description(tensor) for part, tensor in tensors},
    }
    if any(tensor.counts for _, tensor in tensors):
        event["cname"] = "terrible"  # the format's own name of a strong red
    return event


def _origin(trace: Frames, process: int, spans: dict[int, _Span], last: int) -> Iterator[Event]:
    first = trace.first_nonfinite
    if first is None or first.position not in spans:
        return
    span = spans[first.position]
    backward = first.phase == "backward"
    yield {
        "name": harmless(f"first not finite: {first}"),
        "ph": "i",
        "s": "p",
        "ts": (2 * last - span.begin if backward else span.end) * _UNIT,
        "pid": process,
        "tid": _BACKWARD if backward else _FORWARD,
    }


def _slice(name: str, process: int, thread: int, begin: int, length: int) -> Event:
    return {"name": harmless(name, _MAX_NAME), "ph": "X", "ts": begin, "dur": length, "pid": process, "tid": thread}


def _label(process: int, kind: str, name: str, thread: int = 0) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": harmless(name, _MAX_NAME)}}


def _description(tensor: TensorRecord) -> str:
    shape = shape_in_words(tensor.shape)
    found = tensor.counts or "finite"
    return harmless(f"{found}, absmax {tensor.record.absmax:.4g}, {shape} {tensor.dtype}", _MAX_NAME)


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
