"""A report as a JSON document. Non-finite numbers are strings in it, which every JSON reader can read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from hallo_numguard.records import GradientRecord, Offender, OverflowReport, StepRecord, Verdict

SCHEMA_VERSION = 1
_BY_PARAMETER = ("absmax", "norm", "nonfinite")


def write(report: OverflowReport) -> str:
    """Returns the document."""
    document = {
        "schema_version": SCHEMA_VERSION,
        **asdict(replace(report, history=())),
        "verdict": report.verdict.value,
        "history": _history(report.history),
    }
    return json.dumps(_without_nonfinite(document), allow_nan=False)


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
        values = {item.name: document[item.name] for item in fields(OverflowReport)}
        values["verdict"] = Verdict(values["verdict"])
        values["first"] = values["first"] and _offender(values["first"])
        values["offenders"] = tuple(map(_offender, values["offenders"]))
        values["evidence"] = tuple(values["evidence"])
        values["not_checked"] = tuple(values["not_checked"])
        values["loss_scale"] = float(values["loss_scale"])
        values["history"] = _read_history(values["history"])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
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
            float(columns["absmax"][position]), float(columns["norm"][position]), columns["nonfinite"][position]
        )
        for name, columns in document["parameters"].items()
        if columns["nonfinite"][position] is not None
    }
    values = {**document["steps"][position], "parameters": parameters}
    for name in ("absmax", "norm", "loss_scale"):
        values[name] = float(values[name])
    if values["loss"] is not None:
        values["loss"] = float(values["loss"])
    return StepRecord(**values)


def _offender(document: Mapping[str, Any]) -> Offender:
    values = dict(document)
    for name in ("index", "shape", "aliases"):
        values[name] = tuple(values[name])
    values["absmax"] = float(values["absmax"])
    return Offender(**values)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return value
