"""A process that ends right after a collective of the guard ends well."""

from __future__ import annotations

import os
import subprocess
import sys

import deepspeed_support as support

TRIES = 2  # without the wait at exit one in two is aborted
SCRIPT = """
import sys
import torch
from hallo_numguard.guard.collectives import Ranks

sys.setswitchinterval(1000)  # nobody makes this thread give up Python's lock
torch.distributed.init_process_group("gloo")
ranks = Ranks()
for _ in range(20):
    ranks.sum(torch.ones(3))
"""


def test_the_last_collective_is_over_when_python_closes_down():
    for _ in range(TRIES):
        port = support.free_port()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env=os.environ | support.rank_environment(rank, 2, port),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in ranks:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
