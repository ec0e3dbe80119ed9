"""Scripts that make engines in two processes, which live on from one script to the next."""

from __future__ import annotations

import atexit
import functools
from pathlib import Path

import tells_failures
from deepspeed_support import skip_without_a_gpu_for_each
from processes import Processes

RANKS = 2
WORKER = Path(__file__).with_name("engine_worker.py")

_HEAD = """
import logging, os
import deepspeed, torch
import deepspeed_support as support
import hallo_numguard as ng
from deepspeed_support import KINDS, name_of, plant_in_gradient
logging.disable(logging.CRITICAL)
RANK = int(os.environ["RANK"])
"""


def run_engines(script: str, timeout: float = 200, contains_failures: bool = False) -> list[str]:
    """Runs a script with the usual imports on two ranks; returns what each printed. It puts back what it patches.

    Fails if one fails or hangs, or if the guard failed in one, unless `contains_failures`.
    """
    skip_without_a_gpu_for_each(RANKS)
    answers = _ranks().ask({"script": _HEAD + script}, timeout)
    outputs = [answer["output"] for answer in answers]
    if any(answer["failed"] for answer in answers):
        _ranks().stop()  # the other may be anywhere
        raise AssertionError("\n--- the other rank\n".join(outputs))
    for output in outputs:
        assert contains_failures or tells_failures.PREFIX not in output, output
    return outputs


@functools.cache
def _ranks() -> Processes:
    ranks = Processes(WORKER, RANKS)
    atexit.register(ranks.stop)
    return ranks
