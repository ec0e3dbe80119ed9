"""One rank: runs the cases that it is told of. A case in, a result out, a line each."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import traceback
import warnings
from typing import Any

import torch

from hallo_numguard.guard import containment

from causes.cases import Case, Seen
from causes.planted import Run
from causes.ways import WAYS

WORLD = int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["RANK"])


def main() -> None:
    """Answers until there are no more cases."""
    logging.disable(logging.CRITICAL)
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
        print(json.dumps(vars(run(Case(**json.loads(line))))), file=results, flush=True)


def run(case: Case) -> Seen:
    """Trains with the cause planted."""
    containment.contained.clear()
    torch._dynamo.reset()
    planted = Run(case, RANK)
    error = ""
    try:
        WAYS[case.way](planted)
    except Exception as caught:  # noqa: BLE001 - whatever it is, it is what came of this case
        error = f"{type(caught).__name__}: {caught}"[:300] + "".join(traceback.format_tb(caught.__traceback__))[-1500:]
        planted.end()
    reports = {str(report.step): _in_short(report) for report in planted.reports}
    held = [getattr(parameter, "_local_tensor", parameter) for parameter in planted.model.parameters()]
    is_finite = all(bool(tensor.isfinite().all()) for tensor in held)
    gc.collect()  # engines refer to themselves
    return Seen(error, reports, [f"{probe}: {failure!r}" for probe, failure in containment.contained], is_finite)


def _in_short(report: Any) -> dict[str, Any]:
    names = ("kind", "name", "module", "operation", "line", "sample", "rank")
    first = {name: getattr(report.first, name, None) for name in names}
    return {"verdict": report.verdict.value, "provisional": report.provisional, **first, "text": str(report)}


if __name__ == "__main__":
    main()
