"""The action after a report, agreed by all ranks before any of them acts."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from hallo_numguard.core.config import ACTIONS, OverflowCallback, Policy, check_action
from hallo_numguard.core.errors import NumericsError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.guard.collectives import Ranks

_log = logging.getLogger("hallo_numguard")

_CALLBACK_FAILED = len(ACTIONS)  # more severe than any action: some rank is going to raise


class Answer(NamedTuple):
    """Action of every rank once the step's gradients are dropped: raise, go back to a checkpoint, or go on."""

    error: BaseException | None = None
    goes_back: bool = False


def agree(
    report: OverflowReport,
    policy: Policy,
    callback: OverflowCallback | None,
    ranks: Ranks,
    device: torch.device,
    can_go_back: bool,
    may_settle: bool = False,
) -> Answer:
    """Asks the callback and the policy, and takes the most severe answer of all ranks.

    If the run cannot go back to a checkpoint, or not once more, "rollback" is "raise". `may_settle` tells whether a
    lower loss scale is still to be tried.
    """
    error: BaseException | None = None
    severity = 0
    try:
        severity = ACTIONS.index(_choose(report, policy, callback, may_settle))
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
        _announce(report, action)
    return Answer(goes_back=action == "rollback")


def _choose(report: OverflowReport, policy: Policy, callback: OverflowCallback | None, may_settle: bool) -> str:
    answer = callback(report) if callback is not None else None
    if answer is not None:
        return check_action(answer, "what on_overflow returned")
    return policy.action_for(report, may_settle)


def _announce(report: OverflowReport, action: str) -> None:
    if action == "continue":
        _log.info("%s", report.headline())
    else:
        _log.warning("%s", report)
