"""What a look at files, or at a run that is about to start, has found. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hallo_numguard.files import without_nonfinite
from hallo_numguard.records import Finding

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PreflightReport:
    """What was found, and what was looked at.

    Attributes:
        findings: Gravest first.
        checked: What was looked at and how much of it, a sentence each.
        unchecked: What could not be looked at, and why, a sentence each.
    """

    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything was looked at, and nothing found that needs a person."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """Of a command: 1 with findings (other than for information), 2 if something could not be checked, else 0."""
        if any(finding.severity != "info" for finding in self.findings):
            return 1
        return 2 if self.unchecked else 0

    def to_dict(self) -> dict[str, Any]:
        """Returns it as values that JSON has."""
        document = {"schema_version": SCHEMA_VERSION, "ok": self.ok, "exit_code": self.exit_code, **asdict(self)}
        return without_nonfinite(document)


def merge(reports: list[PreflightReport]) -> PreflightReport:
    """Returns one report of all that several have."""
    return PreflightReport(
        gravest_first([finding for report in reports for finding in report.findings]),
        tuple(sentence for report in reports for sentence in report.checked),
        tuple(sentence for report in reports for sentence in report.unchecked),
    )


def gravest_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Returns the findings by severity; those of the same one in the order in which they came."""
    return tuple(sorted(findings, key=lambda finding: ("error", "warning", "info").index(finding.severity)))
