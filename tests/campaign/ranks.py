"""Ranks that stay alive between cases."""

from __future__ import annotations

from pathlib import Path

from campaign.cases import Seen
from processes import CaseRanks

WORKER = Path(__file__).with_name("worker.py")


def start(world: int) -> CaseRanks:
    """Returns a process a rank, each started when it is first asked."""
    return CaseRanks(WORKER, world, Seen.from_dict, timeout=60)
