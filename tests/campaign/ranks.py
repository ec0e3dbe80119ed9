"""Ranks that stay alive between cases."""

from __future__ import annotations

from pathlib import Path

from campaign.cases import Case, Seen
from processes import CaseRanks

WORKER = Path(__file__).with_name("worker.py")


class Ranks:
    """Processes of one kind at a time: what DeepSpeed keeps for a process, a way must not leave to another."""

    def __init__(self) -> None:
        self._kind: tuple[str, int] | None = None
        self._processes: CaseRanks | None = None

    @staticmethod
    def of(case: Case) -> tuple[str, int]:
        """Returns the kind of processes that a case needs: cases that are sorted by it need new ones seldom."""
        return case.way, case.world

    def run(self, case: Case) -> list[Seen]:
        """Returns what each rank has seen.

        Raises:
            RuntimeError: If one dies or hangs.
        """
        if self._processes is None or self._kind != self.of(case):
            self.stop()
            self._kind = self.of(case)
            self._processes = CaseRanks(WORKER, case.world, Seen.from_dict, timeout=120)
        return self._processes.run(case)

    def stop(self) -> None:
        """Ends the processes."""
        if self._processes is not None:
            self._processes.stop()
