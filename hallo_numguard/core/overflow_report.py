"""What happened in a step whose gradients were not finite: as a record, as a JSON document, as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hallo_numguard.core.documents import without_nonfinite
from hallo_numguard.core.records import GradientRecord, Offender, StepRecord, Verdict
from hallo_numguard.core.safe_text import harmless

SCHEMA_VERSION = 1
_BY_PARAMETER = ("absmax", "norm", "nonfinite")
_WIDTH = 110
_MAX_OFFENDERS = 3
_MEANING = {
    True: "training will go on by itself",
    False: "no loss scale can mend this",
    None: "it may come back",
}


@dataclass(frozen=True)
class OverflowReport:
    """What happened in a step whose gradients were not finite.

    Attributes:
        step: Number of the step, from 1, as DeepSpeed counts.
        loss_scale: In force during the backward pass.
        verdict: What it means.
        provisional: True until a later step has confirmed the verdict.
        recoverable: True if training will go on by itself, False if nothing but a repair helps, None if unknown.
        first: The earliest place in the step's dataflow where a non-finite value stands.
        offenders: Parameters whose gradients are non-finite, in the order in which their gradients became ready.
        evidence: What was looked at, and what was seen.
        not_checked: What a complete answer would have needed.
        advice: What to do.
        world_size: Number of ranks that took part.
        consecutive_skips: Steps skipped in a row, this one included; 0 if this one was applied all the same.
        settles_at: The loss scale at which steps are expected to be finite again, where that could be told.
        history: The flight recorder's steps on the rank that holds this report, this one last.
        environment: Versions, host and rank of the process that made this report, and what there hides NaN.
    """

    step: int
    loss_scale: float
    verdict: Verdict
    provisional: bool
    recoverable: bool | None
    first: Offender | None
    offenders: tuple[Offender, ...]
    evidence: tuple[str, ...]
    not_checked: tuple[str, ...]
    advice: str
    world_size: int = 1
    consecutive_skips: int = 1
    settles_at: float | None = None
    history: tuple[StepRecord, ...] = field(default=(), compare=False, repr=False)
    environment: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        """Returns the report as a JSON document. Non-finite numbers are written as strings."""
        return write(self)

    @classmethod
    def from_json(cls, text: str) -> OverflowReport:
        """Returns the report that `to_json` wrote.

        Raises:
            ValueError: If `text` is not such a document, or of a version that this one cannot read.
        """
        return read(text)

    def __str__(self) -> str:
        return render(self)


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


def outcome(report: OverflowReport) -> str:
    """Returns what became of the step: "skipped", as it should be, or "applied all the same"."""
    return "skipped" if report.consecutive_skips else "applied all the same"


def headline(report: OverflowReport) -> str:
    """Returns one line: what happened, where, and what it means."""
    what = f"step {report.step} was {outcome(report)}: {report.verdict}"
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
        shown = [str(item) for item in others[:_MAX_OFFENDERS]]
        if len(others) > _MAX_OFFENDERS:
            shown.append(f"... and {len(others) - _MAX_OFFENDERS} more")
        table.append(("gradients", shown))
    table.append(("what to do", [report.advice]))
    return table


def render(report: OverflowReport) -> str:
    """Returns the whole report, wrapped to a terminal's width."""
    ranks = f", {report.world_size} ranks" if report.world_size > 1 else ""
    scale = f"loss scale {report.loss_scale:g}{ranks}"
    lines = [f"Step {report.step} was {outcome(report)}, its gradients are not finite ({scale})."]
    for label, sentences in rows(report):
        for position, sentence in enumerate(sentences):
            lead = f"  {label if position == 0 else '':<12}"
            lines.append(textwrap.fill(sentence, _WIDTH, initial_indent=lead, subsequent_indent=" " * 14))
    return "\n".join(lines)
