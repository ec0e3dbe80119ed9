"""A process that ends right after a collective of the guard ends well."""

from __future__ import annotations

import subprocess
import sys

import deepspeed_support as support

TRIES = 6  # without the wait at exit one in two is aborted
SCRIPT = """
import os
import sys
import torch
from hallo_numguard.guard.collectives import Ranks

def is_a_rank(port):
    # Starts two ranks, and waits for them; tells whether this is one of them.
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            return True
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return sys.exit("a rank was aborted") if any(statuses) else False

if not any(map(is_a_rank, sys.argv[1:])):
    sys.exit()
sys.setswitchinterval(1000)  # nobody makes this thread give up Python's lock
torch.distributed.init_process_group("gloo")
ranks = Ranks()
for _ in range(20):
    ranks.sum(torch.ones(3))
"""


def test_the_last_collective_is_over_when_python_closes_down():
    ports = [str(support.free_port()) for _ in range(TRIES)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *ports], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
