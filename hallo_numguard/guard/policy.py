"""The action after a report, agreed by all ranks before any of them acts."""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

import torch

from hallo_numguard.core.config import ACTIONS, OverflowCallback, Policy, check_action
from hallo_numguard.core.errors import NumericsError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.guard.collectives import Ranks

_log = logging.getLogger("hallo_numguard")

REMINDER_STEPS = 1000  # steps after which a report that comes again is logged as a whole

_CALLBACK_FAILED = len(ACTIONS)  # more severe than any action: some rank is going to raise


class Answer(NamedTuple):
    """Action of every rank once the step's gradients are dropped: raise, go back to a checkpoint, or go on."""

    error: BaseException | None = None
    goes_back: bool = False


class Announcer:
    """Logs reports: those that only repeat the one before on one line."""

    def __init__(self) -> None:
        self._last: OverflowReport | None = None  # that was logged as a whole
        self._times = 0

    def announce(self, report: OverflowReport, action: str) -> None:
        """Logs a report after which training goes on."""
        last, self._times = self._last, self._times + 1
        if action == "continue":
            _log.info("%s", report.headline())
        elif last is not None and _says_the_same(report, last) and report.step - last.step < REMINDER_STEPS:
            _log.warning("%s; same as step %d, %d times", report.headline(), last.step, self._times)
            return
        else:
            _log.warning("%s", report)
        self._last, self._times = (None if action == "continue" else report), 0


def _says_the_same(left: OverflowReport, right: OverflowReport) -> bool:
    return _gist(left) == _gist(right)


def _gist(report: OverflowReport) -> tuple[object, ...]:
    """What a report says, but for places and amounts."""
    first = report.first
    where = None if first is None else (first.kind, first.name, first.module, first.rank, first.operation, first.line)
    return report.verdict, report.recoverable, report.outcome, where, re.sub(r"\d+", "", report.advice)


def agree(
    report: OverflowReport,
    policy: Policy,
    callback: OverflowCallback | None,
    ranks: Ranks,
    device: torch.device,
    can_go_back: bool,
    announcer: Announcer,
    may_settle: bool = False,
    in_a_row: int = 0,
) -> Answer:
    """Asks the callback and the policy, and takes the most severe answer of all ranks.

    If the run cannot go back to a checkpoint, or not once more, "rollback" is "raise". `may_settle` tells whether a
    lower loss scale is still to be tried, `in_a_row` counts reported steps in a row that were applied all the same.
    """
    error: BaseException | None = None
    severity = 0
    try:
        severity = ACTIONS.index(_choose(report, policy, callback, may_settle, in_a_row))
    except BaseException as failure:  # noqa: BLE001 - user code; raised again below, when no rank waits for another
        error, severity = failure, _CALLBACK_FAILED
    agreed = ranks.highest(severity, device)
    if agreed == _CALLBACK_FAILED:
        if error is None:
            _log.error("on_overflow or a policy callable raised on another rank")
        return Answer(error or NumericsError(report))
    action = ACTIONS[agreed]
    if action == "raise" or (action == "rollback" and not can_go_back):
        return Answer(NumericsError(report))
    if ranks.speaks:
        announcer.announce(report, action)
    return Answer(goes_back=action == "rollback")


def _choose(
    report: OverflowReport, policy: Policy, callback: OverflowCallback | None, may_settle: bool, in_a_row: int
) -> str:
    answer = callback(report) if callback is not None else None
    if answer is not None:
        return check_action(answer, "what on_overflow returned")
    return policy.action_for(report, may_settle, in_a_row)
