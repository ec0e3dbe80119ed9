"""One of two ranks that run one script after another in the same process group: a script in, its output out.

To start two processes with DeepSpeed takes longer than what most scripts do.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
import traceback

import deepspeed

from hallo_numguard.guard.containment import contained

import tells_failures


def main() -> None:
    """Answers until there are no more scripts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["script"])), file=answers, flush=True)


def run(script: str) -> dict[str, str | bool]:
    """Runs a script; returns what it printed, and whether it failed."""
    output, failed = io.StringIO(), False
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})
            deepspeed.comm.barrier()
        except BaseException:  # noqa: BLE001 - whatever a script raises is its result
            traceback.print_exc()
            failed = True
    told = "".join(f"{tells_failures.PREFIX}{probe}: {error!r}\n" for probe, error in contained)
    contained.clear()
    deepspeed.utils.groups.mpu = None  # a pipeline's grid, for whichever engine comes next
    gc.collect()  # engines refer to themselves
    return {"output": output.getvalue() + told, "failed": failed}


if __name__ == "__main__":
    main()
