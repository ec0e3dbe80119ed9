"""Every kind of engine on the release of DeepSpeed that can be imported here; a line of JSON each."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import torch

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import KINDS, name_of, plant_in_gradient, train_step, weights

STEPS = 3
SETTLING_STEPS = 36  # older releases begin with a scale of 2^32 where the fp16 block is off
PLACE = ("hidden.weight", (7, 3))


def main() -> None:
    """Tries all kinds."""
    logging.disable(logging.CRITICAL)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    for kind in KINDS:
        print(json.dumps({"kind": name_of(kind), "found": problem(kind)}), file=results, flush=True)


def problem(kind: tuple[str, int, bool, str]) -> str:
    """Returns what does not hold with a kind of engine; "" if all does."""
    setup, stage, offload, _ = kind
    steps = SETTLING_STEPS if setup == "half" else STEPS

    def make() -> Any:
        return support.make_engine(setup, stage=stage, offload=offload, gradient_clipping=0.0)  # which rounds nothing

    try:
        plain = make()
        losses = [train_step(plain, step) for step in range(steps)]
    except Exception as error:  # noqa: BLE001 - theirs
        return f"DeepSpeed: {_line(error)}"
    try:
        guarded = ng.attach(engine := make())
    except ng.UnsupportedDeepSpeed as error:
        return f"refused: {_line(error)}"
    except Exception as error:  # noqa: BLE001 - to be shown
        return f"attach: {_line(error)}"
    try:
        return _problem_of(engine, guarded, losses, weights(plain))
    except Exception as error:  # noqa: BLE001 - to be shown
        return _line(error)
    finally:
        guarded.detach()


def _problem_of(engine: Any, guard: Any, losses: list[float], expected: dict[str, torch.Tensor]) -> str:
    if [train_step(engine, step) for step in range(len(losses))] != losses:
        return "other losses"
    if not all(torch.equal(value, expected[name]) for name, value in weights(engine).items()):
        return "other weights"
    report, last = guard.last_report, guard.history[-STEPS:]
    if (report is not None and report.verdict is not ng.Verdict.SCALE_TOO_HIGH) or not all(one.applied for one in last):
        return "a false alarm"
    handle = dict(engine.module.named_parameters())[PLACE[0]].register_hook(plant_in_gradient((9, 4)))
    train_step(engine, STEPS)
    handle.remove()
    offenders = [] if guard.last_report is None else guard.last_report.offenders
    if [(one.name, one.index) for one in offenders] != [(PLACE[0], (9, 4))]:
        return f"a bad gradient is named {offenders}"
    ng.inject(engine, "parameter", *PLACE)
    try:
        for step in range(STEPS + 1, STEPS + 3):
            train_step(engine, step)
    except ng.NumericsError as error:
        first = error.report.first
        if (error.report.verdict, first.name, first.index) == (ng.Verdict.WEIGHTS_NONFINITE, *PLACE):
            return ""
        return f"a bad weight is named {error.report.verdict} {first.name} {first.index}"
    return "a bad weight stops nothing"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


if __name__ == "__main__":
    sys.exit(main())
