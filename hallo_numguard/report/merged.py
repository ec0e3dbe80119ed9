"""Reports and traces as one JSON document: what `hallo-numguard report --format json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hallo_numguard.core.documents import without_nonfinite
from hallo_numguard.core.overflow_report import SCHEMA_VERSION, document_of
from hallo_numguard.report.inputs import Material, NamedTrace


def merged(material: Material) -> dict[str, Any]:
    """Returns all documents, each with the name of its file, reports by step and rank."""
    reports = [
        {"file": item.source, "rank": item.rank, "report": document_of(item.report)}
        for overflow in material.overflows
        for item in overflow.ranks
    ]
    return {"schema_version": SCHEMA_VERSION, "reports": reports, "traces": list(map(_trace, material.traces))}


def _trace(named: NamedTrace) -> dict[str, Any]:
    trace = named.trace
    return without_nonfinite(
        {
            "file": named.source,
            "dropped": trace.dropped,
            "first_nonfinite": trace.first_nonfinite and asdict(trace.first_nonfinite),
            "frames": list(map(asdict, trace.frames)),
        }
    )
