"""One rank: runs the cases that it is told of, one after another. A case in, a result out, a line each."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import torch

import hallo_numguard as ng

import deepspeed_support as support
from campaign.cases import CLEAN_STEPS, FAULTY_STEP, STEPS, Case, Seen
from campaign.faults import build, config_of, observed, plant

RANK = int(os.environ["RANK"])
SETTLING_STEPS = 45
DTYPES = {"fp16": torch.float16, "half": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Answers until there are no more cases."""
    logging.disable(logging.CRITICAL)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    for line in sys.stdin:
        case = Case(**json.loads(line))
        print(json.dumps(vars(run(case))), file=results, flush=True)


def run(case: Case) -> Seen:
    """Trains a model with the fault in it, guarded."""
    # DeepSpeed converts parameters, not buffers: whoever trains in half precision does so himself.
    support.single_process_environment()
    support.allow_fp16()
    model = build(case).to(DTYPES.get(case.setup, torch.bfloat16))
    power = 34 if case.fault == "scale" else 6
    groups_of = support.trained_by if case.model != "experts" else type(model).groups
    engine = support.make_engine(case.setup, power, case.stage, case.offload, model, groups_of)
    reports: list[ng.OverflowReport] = []
    guard = ng.attach(engine, config_of(case), on_overflow=reports.append)
    planted = plant(case, engine, model)
    raised = False
    steps = {"none": CLEAN_STEPS, "scale": SETTLING_STEPS}.get(case.fault, STEPS)
    try:
        for step in range(1, steps + 1):
            train(case, engine, step)
            if case.fault == "scale" and guard.history[-1].applied:
                break
    except ng.NumericsError:
        raised = True
    seen = observed(guard, reports, raised, planted, is_finite(engine))
    guard.detach()
    return seen


def train(case: Case, engine: Any, step: int) -> None:
    """One step on this rank's batch."""
    model = engine.module
    model.trap.armed = case.fault == "backward" and step == FAULTY_STEP
    batch = 0 if case.fault == "scale" else step  # what one batch needs, another may not
    generator = torch.Generator().manual_seed(batch + 1000 * RANK)
    arguments, target = model.batch(generator, next(model.parameters()).dtype)
    loss = model.loss(engine(*[argument.to(engine.device) for argument in arguments]), target.to(engine.device))
    if case.fault == "loss" and step == FAULTY_STEP and case.culprit == RANK:
        loss = loss * float("inf")
    engine.backward(loss)
    engine.step()


def is_finite(engine: Any) -> bool:
    """Whether what this rank holds of the weights is."""
    held = (getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters())
    ours = all(bool(torch.isfinite(tensor).all()) for tensor in held)
    flag = torch.tensor(int(ours), device=engine.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


if __name__ == "__main__":
    main()
