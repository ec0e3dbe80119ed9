"""Ranks that stay alive between cases."""

from __future__ import annotations

from pathlib import Path

from causes.cases import Case, Seen
from processes import Processes

WORKER = Path(__file__).with_name("worker.py")


class Ranks(Processes):
    """A process a rank.

    Args:
        world: Number of processes.
    """

    def __init__(self, world: int) -> None:
        super().__init__(WORKER, world)

    def run(self, case: Case, timeout: float = 120) -> list[Seen]:
        """Returns what each rank has seen.

        Raises:
            RuntimeError: If one dies or hangs.
        """
        try:
            return [Seen(**answer) for answer in self.ask(case.to_dict(), timeout)]
        except RuntimeError as error:
            raise RuntimeError(f"{case}: {error}") from error
