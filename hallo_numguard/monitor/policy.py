"""What is done about a report, agreed by all ranks before anyone acts."""

from __future__ import annotations

import logging

import torch

from hallo_numguard.config import ACTIONS, OverflowCallback, Policy, check_action
from hallo_numguard.errors import NumericsError
from hallo_numguard.monitor.agreement import Ranks
from hallo_numguard.records import OverflowReport
from hallo_numguard.reports.text import headline

_log = logging.getLogger("hallo_numguard")

_CALLBACK_FAILED = len(ACTIONS)  # graver than any action: some rank is going to raise


def agree(
    report: OverflowReport,
    policy: Policy,
    callback: OverflowCallback | None,
    ranks: Ranks,
    device: torch.device,
) -> BaseException | None:
    """Asks the callback and the policy, takes the gravest answer of all ranks, and carries it out.

    Returns:
        What every rank has to raise once DeepSpeed has dropped the step's gradients, or None to go on.
    """
    error: BaseException | None = None
    gravity = 0
    try:
        gravity = ACTIONS.index(_choose(report, policy, callback))
    except BaseException as failure:  # noqa: BLE001 - user code; raised again below, when no rank waits for another
        error, gravity = failure, _CALLBACK_FAILED
    agreed = ranks.highest(gravity, device)
    if agreed == _CALLBACK_FAILED:
        if error is None:
            _log.error("on_overflow or a policy callable raised on another rank")
        return error or NumericsError(report)
    action = ACTIONS[agreed]
    if action == "raise":
        return NumericsError(report)
    if ranks.rank == 0:
        _announce(report, action)
    return None


def _choose(report: OverflowReport, policy: Policy, callback: OverflowCallback | None) -> str:
    answer = callback(report) if callback is not None else None
    if answer is not None:
        return check_action(answer, "what on_overflow returned")
    return policy.action_for(report)


def _announce(report: OverflowReport, action: str) -> None:
    if action == "continue":
        _log.info("%s", headline(report))
    else:
        _log.warning("%s", report)
