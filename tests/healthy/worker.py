"""One rank: lives the lives that it is told of, guarded and unguarded. A life in, a result out, a line each."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hallo_numguard.guard import containment

from healthy.families import FAMILIES
from healthy.lives import Life, Seen
from healthy.ways import WAYS, Run

WORLD = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["RANK"])


class Lines(logging.Handler):
    """Collects what the guard logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname.lower()}: {record.getMessage()}")


def main() -> None:
    """Answers until there are no more lives."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # frameworks print
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if WORLD == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
    else:
        torch.distributed.init_process_group("gloo")
    for line in sys.stdin:
        print(json.dumps(vars(live(Life(**json.loads(line))))), file=results, flush=True)


def live(life: Life) -> Seen:
    """Lives a life twice."""
    started = time.monotonic()
    twin, _, twin_error = _run(life, guarded=False)
    middle = time.monotonic()
    ours, said, error = _run(life, guarded=True)
    ended = time.monotonic()
    different = sorted(name for name in ours.keys() | twin.keys() if ours.get(name) != twin.get(name))
    steps, skipped = said.pop("steps", 0), said.pop("skipped", 0)
    return Seen(twin_error, error, different, said, steps, skipped, (middle - started, ended - middle))


def _run(life: Life, guarded: bool) -> tuple[dict[str, str], dict[str, int], str]:
    """Returns digests of all that the run ends with, what was said how often, and what ended it before its end."""
    lines = Lines()
    logger = logging.getLogger("hallo_numguard")
    logger.addHandler(lines)
    containment.contained.clear()
    error = ""
    run = Run(FAMILIES[life.family], life.dtype, life.steps, guarded, RANK)
    try:
        WAYS[life.way][1](run)
    except Exception as caught:  # noqa: BLE001 - whatever it is, it is what came of this life
        error = (
            f"{type(caught).__name__}: {caught}"[:300]
            + "\n"
            + "".join(traceback.format_tb(caught.__traceback__))[-2000:]
        )
    finally:
        logger.removeHandler(lines)
    try:
        ends = {} if error else dict(_ends(run))
        said = _said(run, lines.lines) if guarded else Counter()
    finally:
        del run
        gc.collect()
    return ends, dict(said), error


def _said(run: Run, lines: list[str]) -> Counter[str]:
    said: Counter[str] = Counter()
    spoken = {str(report) for report in run.reports} | {report.headline() for report in run.reports}
    for guard in run.guards:
        spoken.update(map(str, guard.findings))
        said.update(f"{_level(finding, lines)} {finding.kind}: {finding}" for finding in guard.findings)
        said["steps"] = max(said["steps"], len({record.step for record in guard.history}))
        said["skipped"] += sum(not record.applied for record in guard.history)
    said.update(map(_in_a_line, run.reports))
    said.update(f"contained {probe}: {error!r}" for probe, error in containment.contained)
    said.update(line for line in lines if line.partition(": ")[2] not in spoken)
    return said


def _level(finding: Any, lines: list[str]) -> str:
    """How loud a finding was: what is information only, and is logged as such, is a note."""
    is_loud = finding.severity != "info" or any(line.endswith(str(finding)) for line in lines)
    return "finding" if is_loud else "note"


def _in_a_line(report: Any) -> str:
    words = f"report {report.verdict}"
    if report.verdict == "scale_too_high" or report.first is None:
        return words
    return f"{words}: {report.first.kind} {report.first.name}"


def _ends(run: Run) -> Iterator[tuple[str, str]]:
    """All that must be the same in the end."""
    named = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    for name, tensor in named.items():
        if not hasattr(tensor, "ds_tensor"):  # a slice with padding, of which the optimizer holds the whole
            yield name, _digest(tensor)
    for at, tensor in enumerate(run.tensors()):
        yield f"optimizer {at}", _digest(tensor)
    yield "torch's generator", _digest(torch.get_rng_state())
    yield "Python's generator", str(random.getstate())
    yield "numpy's generator", str(np.random.get_state())


def _digest(tensor: Any) -> str:
    held = getattr(tensor, "_local_tensor", tensor).detach()
    return hashlib.sha256(held.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
