"""Findings other than overflows: in training, in files, before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hallo_numguard.core.documents import encode
from hallo_numguard.core.records import Offender

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """A finding other than an overflow: in training, in a file, before a run.

    Attributes:
        kind: Kind of finding. In training: "nonfinite" (a weight, buffer or optimizer state, outside of a step),
            "absurd_weight" (finite, and far too large), "loss_spike", "norm_spike", "update_ratio" (learning rate too
            high), "dead_gradient", "exploding_gradient", "input_range", "lost_update" (steps that change nothing),
            "tokens_dropped", "router_saturated" (routers of a mixture of experts),
            "bad_step_applied" (a step whose gradients were not finite), "loss_nonfinite" (a step whose loss was not
            finite, with gradients that were), "update_nonfinite" (weights that an update made non-finite, on one of
            several ranks), "gradients_not_cleared" (a backward pass that adds to non-finite gradients),
            "statistics_restored" (running statistics that a bad batch poisoned), or "not_checked" (tensors that cannot
            be read, each named once).
        message: Sentence on what was expected, and what was found.
        step: Number of the step; None outside of a step.
        name: Name of the tensor concerned, or of the module with several; "" if there is none.
        offender: Non-finite tensor, if there is one.
        severity: "error" (training will fail, or silently do the wrong thing), "warning" or "info".
        file: Path of the file concerned, "" if there is none.
        remedy: Sentence on what to do; "" if there is nothing to add.
    """

    kind: str
    message: str
    step: int | None = None
    name: str = ""
    offender: Offender | None = None
    severity: str = "warning"
    file: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class PreflightReport:
    """Findings, and the checks behind them.

    Attributes:
        findings: Findings by severity, errors first.
        checked: Sentences on what was checked, and how much of it.
        unchecked: Sentences on what could not be checked, and why.
        not_read: Files of other formats, which are not read, beside those that were.
    """

    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything was checked, without a warning or an error."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """Exit code of a command: 1 with a warning or an error, else 2 if something could not be checked, else 0."""
        if any(finding.severity != "info" for finding in self.findings):
            return 1
        return 2 if self.unchecked else 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values that JSON has."""
        return {"schema_version": SCHEMA_VERSION, "ok": self.ok, "exit_code": self.exit_code, **encode(self)}


def merge(reports: list[PreflightReport]) -> PreflightReport:
    """Returns one report with the contents of several."""
    return PreflightReport(
        by_severity([finding for report in reports for finding in report.findings]),
        tuple(sentence for report in reports for sentence in report.checked),
        tuple(sentence for report in reports for sentence in report.unchecked),
        tuple(name for report in reports for name in report.not_read),
    )


def by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """Returns the findings by severity, errors first; those of the same severity stay in order."""
    return tuple(sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity)))
