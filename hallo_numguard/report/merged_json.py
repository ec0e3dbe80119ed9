"""Reports and traces as one JSON document, for programs."""

from __future__ import annotations

import json

from hallo_numguard.core.documents import encode
from hallo_numguard.core.overflow_report import SCHEMA_VERSION
from hallo_numguard.report.inputs import ReportInputs


def render(inputs: ReportInputs) -> str:
    """Returns all documents, each with the name of its file, reports by step and rank."""
    reports = [
        {"file": item.source, "rank": item.rank, "report": item.report.to_document()}
        for overflow in inputs.overflows
        for item in overflow.ranks
    ]
    traces = [
        {
            "file": named.source,
            "dropped": named.trace.dropped,
            "first_nonfinite": encode(named.trace.first_nonfinite),
            "frames": encode(named.trace.frames),
        }
        for named in inputs.traces
    ]
    return json.dumps({"schema_version": SCHEMA_VERSION, "reports": reports, "traces": traces}, allow_nan=False)
