"""One rank: runs the cases that it is told of, one after another. A case in, a result out, a line each."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from dataclasses import replace
from typing import Any

import torch

import hallo_numguard as ng

from campaign import engines, refused
from campaign.cases import FAULTY_STEP, STEPS, Case, Seen
from campaign.faults import config_of, observed, plant
from campaign.loops import LOOPS
from campaign.options import OPTIONS, Option

RANK = int(os.environ["RANK"])
SETTLING_STEPS = 45


def main() -> None:
    """Answers until there are no more cases."""
    logging.disable(logging.CRITICAL)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    for line in sys.stdin:
        case = Case(**json.loads(line))
        print(json.dumps(vars(run(case))), file=results, flush=True)


def run(case: Case, **config: Any) -> Seen:
    """Trains a model with the fault in it, guarded; one without a fault also as it is without a guard.

    Args:
        case: The case.
        config: More arguments of `engines.make`.
    """
    if case.fault == "refused":
        return refused.attempt(case)
    if case.fault != "none":
        return _guarded(case, **config)[0]
    config["gradient_clipping"] = 0.0  # with clipping the norm is rounded otherwise
    try:
        losses = _losses(case, engines.make(case, **config))
        alone = "runs"
    except Exception as error:  # noqa: BLE001 - the table tells it
        losses, alone = [], f"{type(error).__name__}: {error}"[:200]
    seen, guarded = _guarded(case, **config)
    return replace(seen, alone=alone, same_bits=guarded == losses)


def _guarded(case: Case, **config: Any) -> tuple[Seen, list[float]]:
    engine = engines.make(case, 34 if case.fault == "scale" else 6, **config)
    reports: list[ng.OverflowReport] = []
    guard = ng.attach(engine, config_of(case), on_overflow=reports.append)
    planted = plant(case, engine, engine.module)
    losses = []
    raised = False
    try:
        losses = _losses(case, engine, guard)
    except ng.NumericsError:
        raised = True
    seen = observed(guard, reports, raised, planted, engines.is_finite(engine))
    guard.detach()
    return seen, losses


def _losses(case: Case, engine: Any, guard: Any = None) -> list[float]:
    """Trains, and returns the losses."""
    steps = {"none": case.clean_steps, "scale": SETTLING_STEPS}.get(case.fault, STEPS)
    losses = []
    for step in range(1, steps + 1):
        losses.append(train(case, engine, step))
        if case.fault == "scale" and guard.history[-1].applied:
            break
    return losses


def train(case: Case, engine: Any, step: int) -> float:
    """One step on this rank's batch; returns its loss."""
    model = engine.module
    model.trap.armed = case.fault == "backward" and step == FAULTY_STEP
    batch = 0 if case.fault == "scale" else step  # what one batch needs, another may not
    if case.way == "pipeline":
        from campaign import staged

        return staged.train(case, engine, step, batch)
    option = OPTIONS.get(case.way, Option("", ()))
    losses = [functools.partial(_loss, case, engine, step, batch + 10_000 * at) for at in range(option.micro_batches)]
    return LOOPS[option.loop](engine, losses).item()


def _loss(case: Case, engine: Any, step: int, batch: int) -> torch.Tensor:
    model = engine.module
    generator = torch.Generator().manual_seed(batch + 1000 * engines.batch_of(case))
    arguments, target = model.batch(generator, next(model.parameters()).dtype)
    loss = model.loss(engine(*[argument.to(engine.device) for argument in arguments]), target.to(engine.device))
    is_bad = case.fault == "loss" and step == FAULTY_STEP and case.culprit == RANK
    return loss * float("inf") if is_bad else loss


if __name__ == "__main__":
    main()
