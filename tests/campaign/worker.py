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
from campaign.models import MODELS

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
    torch.manual_seed(0)
    # DeepSpeed converts parameters, not buffers: whoever trains in half precision does so himself.
    model = MODELS[case.model]().to(DTYPES.get(case.setup, torch.bfloat16))
    if case.fault == "buffer":
        dict(model.named_buffers())[model.buffer].view(-1)[1] = float("nan")
    power = 34 if case.fault == "scale" else 6
    engine = support.make_engine(case.setup, power, case.stage, case.offload, model)
    local = "always" if case.fault == "gradient" else "on_alarm"
    reports: list[ng.OverflowReport] = []
    guard = ng.attach(engine, ng.GuardConfig(local_gradients=local), on_overflow=reports.append)
    planted = plant(case, engine)
    raised = False
    steps = {"none": CLEAN_STEPS, "scale": SETTLING_STEPS}.get(case.fault, STEPS)
    try:
        for step in range(1, steps + 1):
            train(case, engine, step)
            if case.fault == "scale" and guard.history[-1].applied:
                break
    except ng.NumericsError:
        raised = True
    report = reports[0] if reports else None
    seen = Seen(
        verdict=report and report.verdict.value,
        provisional=report is not None and report.provisional,
        recoverable=report.recoverable if report else None,
        first=report and report.first and named(report.first),
        applied=tuple(record.applied for record in guard.history),
        raised=raised,
        findings=tuple((finding.kind, finding.name) for finding in guard.findings),
        last=(guard.last_report.verdict.value, guard.last_report.provisional) if guard.last_report else (None, False),
        finite=is_finite(engine),
        planted=planted,
        named_scale=reports[-1].settles_at if reports else None,
        settled_at=guard.history[-1].loss_scale,
    )
    guard.detach()
    return seen


def named(first: ng.Offender) -> tuple[str, str, tuple[int, ...], int | None]:
    return first.kind, first.name, first.index, first.rank


def plant(case: Case, engine: Any) -> tuple[str, tuple[int, ...]]:
    """Plants the fault; returns the name that the report must give, and the index."""
    model = engine.module
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    mine = None if case.stage == 3 else case.culprit  # a slice has one owner, a copy may be bad on one rank only

    def inject(kind: str, name: str | None, **options: Any) -> None:
        ng.inject(engine, kind, name, step=FAULTY_STEP, **options)

    if case.fault in ("weight", "frozen_weight"):
        name = model.trainable if case.fault == "weight" else model.frozen
        index = tuple(size - 1 for size in shapes[name])  # in the last rank's slice
        inject("parameter", name, index=index, rank=mine)
        return name, index
    if case.fault == "optimizer_state":
        inject("optimizer_state", model.trainable, index=(3, 5))
        return model.trainable, (3, 5)
    if case.fault == "input":
        index = (2, 3, 1) if case.model == "transformer" else (2, 1, 6, 4)
        inject("input", None, index=index, rank=case.culprit)
        return ("features" if case.model == "transformer" else "noisy"), index
    if case.fault in ("gradient", "reduction"):
        value, rank = (float("nan"), case.culprit) if case.fault == "gradient" else (40000.0, None)
        inject("gradient", model.trainable, index=(7, 2), value=value, rank=rank)
        return model.trainable, (7, 2)
    if case.fault == "forward" and case.is_half:
        inject("parameter", model.trainable, index=(0, 0), value=60000.0, rank=mine)
    elif case.fault == "forward":
        inject("activation", model.module, value=float("inf"), rank=case.culprit)
    if case.fault == "buffer":
        return model.buffer, ((0, 1) if case.model == "transformer" else (1,))
    return {"forward": model.module, "backward": "trap"}.get(case.fault, ""), ()


def train(case: Case, engine: Any, step: int) -> None:
    """One step on this rank's batch."""
    model = engine.module
    model.trap.armed = case.fault == "backward" and step == FAULTY_STEP
    batch = 0 if case.fault == "scale" else step  # what one batch needs, another may not
    generator = torch.Generator().manual_seed(batch + 1000 * RANK)
    arguments, target = model.batch(generator, next(model.parameters()).dtype)
    loss = model.loss(engine(*arguments), target)
    if case.fault == "loss" and step == FAULTY_STEP and case.culprit == RANK:
        loss = loss * float("inf")
    engine.backward(loss)
    engine.step()


def is_finite(engine: Any) -> bool:
    """Whether what this rank holds of the weights is."""
    held = (getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters())
    ours = all(bool(torch.isfinite(tensor).all()) for tensor in held)
    flag = torch.tensor(int(ours))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


if __name__ == "__main__":
    main()
