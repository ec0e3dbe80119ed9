"""Ranks that stay alive: one process group for many questions."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from deepspeed_support import free_port, start_rank


class Processes:
    """A process a rank, started when first asked, and again after one that died or hung.

    Args:
        script: What each of them runs: it answers every line of JSON by one.
        world: Number of processes.
    """

    def __init__(self, script: Path, world: int) -> None:
        self._script = script
        self._world = world
        self._processes: list[subprocess.Popen[str]] = []
        self._lines: list[queue.Queue[str]] = []
        self._errors: list[IO[bytes]] = []

    def ask(self, question: Mapping[str, Any], timeout: float = 60) -> list[dict[str, Any]]:
        """Returns what each rank answers.

        Raises:
            RuntimeError: If one dies or is silent for `timeout` seconds, with the end of what each has written.
        """
        if not self._processes:
            self._start()
        for process in self._processes:
            print(json.dumps(question), file=process.stdin, flush=True)
        answers = []
        for rank, lines in enumerate(self._lines):
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                line = ""
            if not line:
                written = self._written()
                self.stop()
                raise RuntimeError(f"rank {rank} died or hangs\n{written}")
            answers.append(json.loads(line))
        return answers

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
            process = start_rank(self._script, rank, self._world, port, **streams)
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


class CaseRanks(Processes):
    """Ranks that run one case after the other.

    Args:
        worker: Script that reads a case, runs it, and says what it has seen.
        world: Number of processes.
        read: Reads what a rank has said.
        timeout: Time that a case may take, in seconds.
    """

    def __init__(self, worker: Path, world: int, read: Callable[[dict[str, Any]], Any], timeout: float) -> None:
        super().__init__(worker, world)
        self._read = read
        self._timeout = timeout

    def run(self, case: Any) -> list[Any]:
        """Returns what each rank has seen of a case, which has a `to_dict`.

        Raises:
            RuntimeError: If one dies or hangs, with the end of what each has written.
        """
        try:
            return [self._read(answer) for answer in self.ask(case.to_dict(), self._timeout)]
        except RuntimeError as error:
            raise RuntimeError(f"{case}: {error}") from error


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")  # it is gone
