"""Ranks that stay alive between lives."""

from __future__ import annotations

from pathlib import Path

from healthy.lives import Seen
from processes import CaseRanks

WORKER = Path(__file__).with_name("worker.py")


def start(world: int) -> CaseRanks:
    """Returns a process a rank, each started when it is first asked."""
    return CaseRanks(WORKER, world, lambda answer: Seen(**answer), timeout=240)
