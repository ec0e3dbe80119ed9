"""Starts the ranks of many tries, and collects what they say."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from deepspeed_support import free_port, start_rank

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Outcome:
    """What came of many tries.

    Attributes:
        hit: Number of tries whose accident has happened on rank 0.
        wrong: What a run has noticed of them, a line each.
    """

    hit: int
    wrong: list[str]


TRIES_OF_A_PROCESS = 25  # DeepSpeed makes process groups for each pipeline, whose threads stay: 20 a try


def run(world: int, seed: int, count: int, model: str = "whole") -> Outcome:
    """Makes tries on some ranks; `model` is a key of `WAYS`.

    A rank that dies or hangs is what is wrong, with the end of what it has written.
    """
    firsts = range(0, count, TRIES_OF_A_PROCESS)
    outcomes = [_run(world, seed, first, min(TRIES_OF_A_PROCESS, count - first), model) for first in firsts]
    return Outcome(sum(one.hit for one in outcomes), [line for one in outcomes for line in one.wrong])


def _run(world: int, seed: int, first: int, count: int, model: str) -> Outcome:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, TemporaryFile() as errors:
        patch.setenv("CHAOS", f"{seed} {first} {count} {model}")
        streams = {"stdout": subprocess.PIPE, "stderr": errors}
        processes = [start_rank(WORKER, rank, world, port, **streams) for rank in range(world)]
        outputs = [process.communicate()[0] for process in processes]
        errors.seek(0)
        written = errors.read()[-6000:].decode(errors="replace")
    wrong, hit = [], 0
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        for line in output.splitlines():
            said = json.loads(line)
            if "wrong" in said:
                wrong.append(f"rank {rank} of {world}: {said['try']}: {said['wrong']}")
            elif rank == 0:
                hit = said["hit"]
        if process.returncode:
            wrong.append(f"rank {rank} of {world} died or hung\n{written}")
    return Outcome(hit, wrong)
