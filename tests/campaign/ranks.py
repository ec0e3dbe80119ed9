"""Ranks that stay alive between cases: one process group for many engines."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from campaign.cases import Case, Seen
from deepspeed_support import free_port, start_rank

WORKER = Path(__file__).with_name("worker.py")


class Ranks:
    """A process a rank, started when first asked, and again after one that died or hung.

    Args:
        world: Number of processes.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._processes: list[subprocess.Popen[str]] = []
        self._lines: list[queue.Queue[str]] = []
        self._errors: list[IO[bytes]] = []

    def run(self, case: Case, timeout: float = 60) -> list[Seen]:
        """Returns what each rank has seen.

        Raises:
            RuntimeError: If one dies or is silent for `timeout` seconds, with the end of what each has written.
        """
        if not self._processes:
            self._start()
        for process in self._processes:
            print(json.dumps(case.to_dict()), file=process.stdin, flush=True)
        seen = []
        for rank, lines in enumerate(self._lines):
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                line = ""
            if not line:
                written = self._written()
                self.stop()
                raise RuntimeError(f"{case}: rank {rank} died or hangs\n{written}")
            seen.append(Seen.from_dict(json.loads(line)))
        return seen

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        for file in self._errors:
            file.close()
        self._processes, self._lines, self._errors = [], [], []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self._world):
            errors = TemporaryFile()  # noqa: SIM115 - stays open as long as the process lives
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            process = start_rank(WORKER, rank, self._world, port, **streams)
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_read, args=(process, lines), daemon=True).start()
            self._processes.append(process)
            self._lines.append(lines)
            self._errors.append(errors)

    def _written(self) -> str:
        ends = []
        for rank, file in enumerate(self._errors):
            file.seek(0)
            ends.append(f"--- rank {rank}\n{file.read()[-3000:].decode(errors='replace')}")
        return "\n".join(ends)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")  # it is gone
