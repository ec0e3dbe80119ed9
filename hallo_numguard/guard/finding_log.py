"""The findings of a run: kept, counted, and logged."""

from __future__ import annotations

import logging

from hallo_numguard.core.findings import Finding
from hallo_numguard.guard.collectives import Ranks

_log = logging.getLogger("hallo_numguard")

MAX_FINDINGS = 1000


class FindingLog:
    """Keeps the findings of one session, and logs each once.

    Args:
        ranks: Ranks that take part: one of them speaks for what all have seen.

    Attributes:
        findings: The last 1000.
        alarms: Number of all that were more than an information.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.findings: list[Finding] = []
        self.alarms = 0
        self._ranks = ranks

    def note(self, finding: Finding, is_mine: bool | None = None) -> None:
        """Keeps a finding, and logs it.

        Args:
            finding: The finding.
            is_mine: Whether this rank is the one to warn of it; None for the rank that speaks for all.
        """
        self.findings.append(finding)
        self.alarms += finding.severity != "info"
        del self.findings[:-MAX_FINDINGS]
        is_loud = finding.severity != "info" and (self._ranks.speaks if is_mine is None else is_mine)
        _log.log(logging.WARNING if is_loud else logging.INFO, "%s", finding)
