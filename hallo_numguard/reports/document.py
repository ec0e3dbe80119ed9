"""A report as a JSON document. Non-finite numbers are strings in it, which every JSON reader can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from hallo_numguard.files import without_nonfinite
from hallo_numguard.records import GradientRecord, Offender, OverflowReport, StepRecord, Verdict

SCHEMA_VERSION = 1
_BY_PARAMETER = ("absmax", "norm", "nonfinite")


def write(report: OverflowReport) -> str:
    """Returns the document."""
    return json.dumps(document_of(report), allow_nan=False)


def document_of(report: OverflowReport) -> dict[str, Any]:
    """Returns the document as values that JSON has."""
    document = {
        "schema_version": SCHEMA_VERSION,
        **asdict(replace(report, history=())),
        "verdict": report.verdict.value,
        "history": _history(report.history),
    }
    return without_nonfinite(document)


def read(text: str) -> OverflowReport:
    """Returns the report that a document is of.

    Raises:
        ValueError: If it is of none, or of a version that this one cannot read.
    """
    document = json.loads(text)
    if not isinstance(document, Mapping) or document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version") if isinstance(document, Mapping) else None
        raise ValueError(f"not an overflow report of schema version {SCHEMA_VERSION}: got {found!r}")
    try:
        values = {item.name: document[item.name] for item in fields(OverflowReport) if item.name != "environment"}
        values["verdict"] = Verdict(values["verdict"])
        values["first"] = None if values["first"] is None else Offender.from_document(values["first"])
        values["offenders"] = tuple(map(Offender.from_document, values["offenders"]))
        values["evidence"] = tuple(map(str, values["evidence"]))
        values["not_checked"] = tuple(map(str, values["not_checked"]))
        values["advice"] = str(values["advice"])
        values["loss_scale"] = float(values["loss_scale"])
        values["settles_at"] = None if values["settles_at"] is None else float(values["settles_at"])
        for name in ("step", "world_size", "consecutive_skips"):
            values[name] = int(values[name])
        values["history"] = _read_history(values["history"])
        values["environment"] = _read_environment(document.get("environment", {}))
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"not an overflow report: {error!r}") from error
    return OverflowReport(**values)


def _history(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """The steps, and each parameter's figures as columns with an entry a step: names are written once."""
    names = dict.fromkeys(name for step in steps for name in step.parameters)
    columns: dict[str, dict[str, list[Any]]] = {}
    for name in names:
        records = [step.parameters.get(name) for step in steps]
        columns[name] = {
            key: [None if record is None else getattr(record, key) for record in records] for key in _BY_PARAMETER
        }
    return {"steps": [asdict(replace(step, parameters={})) for step in steps], "parameters": columns}


def _read_history(document: Mapping[str, Any]) -> tuple[StepRecord, ...]:
    return tuple(_step(document, position) for position in range(len(document["steps"])))


def _step(document: Mapping[str, Any], position: int) -> StepRecord:
    parameters = {
        name: GradientRecord(
            float(columns["absmax"][position]), float(columns["norm"][position]), int(columns["nonfinite"][position])
        )
        for name, columns in document["parameters"].items()
        if columns["nonfinite"][position] is not None
    }
    values = {**document["steps"][position], "parameters": parameters}
    for name in ("absmax", "norm", "loss_scale"):
        values[name] = float(values[name])
    for name in ("step", "nonfinite"):
        values[name] = int(values[name])
    for name in ("loss", "limit"):
        values[name] = None if values.get(name) is None else float(values[name])
    return StepRecord(**values)


def _read_environment(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, "hides_nan": [str(sentence) for sentence in document.get("hides_nan", ())]} if document else {}
