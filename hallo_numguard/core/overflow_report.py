"""Report on a step whose gradients, or whose loss, were not finite: as a record, as a JSON document, as text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hallo_numguard.core import run_description
from hallo_numguard.core.documents import decode, encode, laid_out_as
from hallo_numguard.core.environment import Environment
from hallo_numguard.core.records import GradientRecord, Offender, StepRecord, Verdict
from hallo_numguard.core.safe_text import harmless

SCHEMA_VERSION = 1
_WIDTH = 110  # characters
_MAX_OFFENDERS = 3  # gradients beside the first offender
_IN_THE_FIRST_LINE = ("happened", "answer")  # rows
_MEANING = {
    True: "training will go on by itself",
    False: "no loss scale can mend this",
    None: "it may come back",
}


@dataclass(frozen=True)
class _Columns:
    """A parameter's figures with an entry for each step; None where the rank held no part of it."""

    absmax: tuple[float | None, ...]
    norm: tuple[float | None, ...]
    nonfinite: tuple[int | None, ...]


@dataclass(frozen=True)
class _History:
    """Steps in the layout of documents: a parameter's figures are columns, so that its name is written once."""

    steps: tuple[StepRecord, ...]
    parameters: Mapping[str, _Columns]

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> _History:
        columns = {}
        for name in dict.fromkeys(name for step in steps for name in step.parameters):
            records = [step.parameters.get(name) for step in steps]
            columns[name] = _Columns(
                tuple(None if record is None else record.absmax for record in records),
                tuple(None if record is None else record.norm for record in records),
                tuple(None if record is None else record.nonfinite for record in records),
            )
        return cls(tuple(replace(step, parameters={}) for step in steps), columns)

    def value(self) -> tuple[StepRecord, ...]:
        rows: list[dict[str, GradientRecord]] = [{} for _ in self.steps]
        for name, columns in self.parameters.items():
            entries = zip(columns.absmax, columns.norm, columns.nonfinite, strict=False)
            for row, (absmax, norm, nonfinite) in zip(rows, entries, strict=False):
                if absmax is not None and norm is not None and nonfinite is not None:
                    row[name] = GradientRecord(absmax, norm, nonfinite)
        return tuple(replace(step, parameters=row) for step, row in zip(self.steps, rows, strict=True))


@dataclass(frozen=True)
class OverflowReport:
    """Report on a step whose gradients, or whose loss, were not finite.

    Attributes:
        step: Number of the step, from 1, as the framework counts.
        loss_scale: Loss scale in force during the backward pass.
        verdict: Cause of the overflow.
        provisional: True until a later step has confirmed the verdict.
        recoverable: True if training will go on by itself, False if nothing but a repair helps, None if unknown.
        first: The earliest place in the step's dataflow where a non-finite value stands.
        offenders: Parameters whose gradients are non-finite, in the order in which their gradients became ready.
        evidence: Sentences on what was checked, and what was seen.
        not_checked: Checks that a complete answer would have needed.
        advice: Sentence on what to do.
        world_size: Number of ranks that took part.
        consecutive_skips: Number of steps skipped in a row, this one included; 0 if this one was applied nevertheless.
        settles_at: Loss scale at which steps are expected to be finite again; None if unknown.
        history: Steps of the flight recorder on the rank that holds this report, this one last.
        environment: Versions, host and rank of the process that made this report, and loaded libraries that hide NaN;
            run, time, name of the run, command, number of ranks, framework, ZeRO stage and device.
        summary: The answer in one sentence, without a full stop; "" if there is none.
        known_from: What has shown the cause, as "the batch, run again"; "" if it is not known.
        happened: Sentence on what happened, where it was something else than gradients that are not finite: a save that
            would have written non-finite values, a loss that was not finite. "" otherwise.
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
    history: tuple[StepRecord, ...] = laid_out_as(_History, default=(), compare=False, repr=False)
    environment: Environment = field(default_factory=dict, compare=False, repr=False)
    happened: str = ""
    summary: str = ""
    known_from: str = ""

    @property
    def outcome(self) -> str:
        """Outcome of the step: "skipped", as it should be, or "applied all the same"."""
        return "skipped" if self.consecutive_skips else "applied all the same"

    def headline(self) -> str:
        """Returns one line with outcome, verdict and first offender. Names in it are harmless text."""
        if self.happened:
            return harmless(f"{self.happened} {self.verdict}")
        what = f"step {self.step} was {self.outcome}: {self.verdict}"
        where = f", {self.summary}" if self.summary else ("" if self.first is None else f", {self.first}")
        return harmless(f"{what}{where} [loss scale {self.loss_scale:g}]")

    def rows(self) -> list[tuple[str, list[str]]]:
        """Returns the report as labelled rows of sentences, for any kind of display. Names are harmless text."""
        provisional = ", provisional" if self.provisional else ""
        meaning = "cause not proved" if self.verdict is Verdict.UNDETERMINED else _MEANING[self.recoverable]
        known = f"; shown by {self.known_from}" if self.known_from else ""
        others = [str(item) for item in self.offenders if item != self.first]
        if len(others) > _MAX_OFFENDERS:
            others[_MAX_OFFENDERS:] = [f"... and {len(others) - _MAX_OFFENDERS} more"]
        table = [
            ("happened", [self.happened] if self.happened else []),
            ("answer", [self.summary] if self.summary else []),
            ("what to do", [self.advice]),
            ("verdict", [f"{self.verdict} ({meaning}{provisional}{known})"]),
            ("first", [] if self.first is None else [str(self.first)]),
            ("operation", _operation(self.first)),
            ("evidence", self.evidence),
            ("not checked", ["; ".join(self.not_checked)] if self.not_checked else []),
            ("gradients", others),
            ("run", run_description.summary(self.environment)),
        ]
        return [(label, list(map(harmless, sentences))) for label, sentences in table if sentences]

    def __str__(self) -> str:
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        scale = f"loss scale {self.loss_scale:g}{ranks}"
        what = f": {self.summary}" if self.summary else ", its gradients are not finite"
        in_step = f"Step {self.step} was {self.outcome}{what} ({scale})."
        lines = [textwrap.fill(harmless(self.happened or in_step), _WIDTH)]
        for label, sentences in self.rows():
            if label in _IN_THE_FIRST_LINE:
                continue
            for position, sentence in enumerate(sentences):
                lead = f"  {label if position == 0 else '':<12}"
                lines.append(textwrap.fill(sentence, _WIDTH, initial_indent=lead, subsequent_indent=" " * 14))
        return "\n".join(lines)

    def to_document(self) -> dict[str, Any]:
        """Returns the report as values that JSON has. Non-finite numbers are strings."""
        return {"schema_version": SCHEMA_VERSION, **encode(self)}

    def to_json(self) -> str:
        """Returns the report as a JSON document. Non-finite numbers are written as strings."""
        return json.dumps(self.to_document(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> OverflowReport:
        """Returns the report from the document that `to_json` wrote.

        Raises:
            ValueError: If `text` is no such document, or of an unknown schema version; `InvalidDocument` if a value has
                the wrong type.
        """
        document = json.loads(text)
        found = document.get("schema_version") if isinstance(document, Mapping) else None
        if found != SCHEMA_VERSION:
            raise ValueError(f"not an overflow report of schema version {SCHEMA_VERSION}: got {found!r}")
        return decode(cls, document)


def _operation(first: Offender | None) -> list[str]:
    """The operation that made the first offender, and its line."""
    if first is None or first.operation is None:
        return []
    line = f", {first.line}" if first.line else ""
    sample = "" if first.sample is None else f", sample {first.sample}"
    return [f"{first.operation}{sample}{line}"]
