"""The timeline for ui.perfetto.dev."""

from __future__ import annotations

import json

import pytest

from hallo_numguard.core import frames
from hallo_numguard.report import inputs as files
from hallo_numguard.report import perfetto

import report_support as support
from report_support import GOLDENS


@pytest.fixture
def trace_file(tmp_path):
    return support.write_trace(tmp_path, support.trace())


def timeline(*paths):
    return perfetto.timeline(files.read(paths))


def test_the_timeline_is_what_it_was_before(trace_file):
    support.compare(GOLDENS / "timeline.json", json.dumps(timeline(*support.LAST_STEP, trace_file), indent=1) + "\n")


def test_calls_lie_inside_of_the_call_that_made_them(trace_file):
    trace = frames.load_trace(trace_file)
    events = [event for event in timeline(trace_file)["traceEvents"] if event["ph"] == "X"]
    for thread in (1, 2):
        spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == thread]
        assert len(spans) == len(trace.frames)
        for frame, (begin, end) in zip(trace.frames, spans, strict=True):
            assert begin < end
            if frame.parent is not None:
                outer = spans[frame.parent]
                assert outer[0] <= begin
                assert end <= outer[1]
    forward = max(event["ts"] + event["dur"] for event in events if event["tid"] == 1)
    assert forward <= min(event["ts"] for event in events if event["tid"] == 2)


def test_the_first_nonfinite_call_is_marked_in_the_timeline(trace_file):
    (mark,) = [event for event in timeline(trace_file)["traceEvents"] if event["ph"] == "i"]
    assert mark["name"].startswith("first not finite: encoder.1.proj")
    red = [event["name"] for event in timeline(trace_file)["traceEvents"] if event.get("cname") == "terrible"]
    assert red[0] == "encoder.0.norm (LayerNorm)", "its gradient came back as NaN"


def test_counters_leave_out_what_is_not_finite():
    events = timeline(*support.LAST_STEP)["traceEvents"]
    norms = [event for event in events if event["ph"] == "C" and event["name"] == "norm" and event["pid"] == 0]
    assert len(norms) == 11
    assert "step 21 (skipped)" in [event["name"] for event in events]
    json.dumps(events, allow_nan=False)
