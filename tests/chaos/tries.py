"""What goes wrong in a try, and where."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

POINTS = (
    "guard.collectives:Ranks._reduce",
    "guard.diagnosis.collect:EvidenceCollector.agree",
    "guard.diagnosis.collect:EvidenceCollector.evidence",
    "guard.diagnosis.collect:EvidenceCollector.scan",
    "guard.diagnosis.collect:EvidenceCollector.step_is_over",
    "guard.diagnosis.replay:Replayer._agree",
    "guard.diagnosis.replay:Replayer._rerun_bad_gradients",
    "guard.diagnosis.replay:Replayer._rerun_bad_loss",
    "guard.reporter:Reporter._dump",
    "guard.reporter:Reporter._environment",
    "guard.step.batch:Batch.add",
    "guard.step.batch:Batch.note_output",
    "guard.step.batch:Batch.restore_statistics",
    "guard.step.early_warnings:EarlyWarnings.after_step",
    "guard.step.early_warnings:EarlyWarnings.before_step",
    "guard.step.figure_exchange:FigureExchange._parts_of",
    "guard.step.figure_exchange:FigureExchange.finish",
    "guard.step.local_gradients:LocalGradients._scan",
    "guard.step.local_gradients:LocalGradients.stats",
    "guard.step.local_gradients:LocalGradients.step_is_over",
    "guard.step.model_call:ModelCall._add_seed",
    "guard.step.recorder:Recorder.begin",
    "guard.step.recorder:Recorder.fresh",
    "tracing.model_state:StateRecorder.after_call",
    "tracing.model_state:StateRecorder.before_call",
    "tracing.rerun:_Run.finish",
    "tracing.rerun:_Run.go_backward",
    "tracing.rerun:_Run.go_forward",
    "trackers.feed:Feed.write",
    "integrations.torch_optim.parameter_gradients:Gradients.read",
)
ACCIDENTS = ("raise", "run out of memory", "sleep", "detach")
FRAMEWORKS = ("transformers", "lightning")
WAYS = {
    "whole": {
        1: ("optimizer", "accelerate", "transformers", "lightning", "deepspeed 0", "deepspeed 2", "deepspeed 3"),
        2: ("optimizer", "accelerate", "deepspeed 0", "deepspeed bf16_fp32 1", "deepspeed 2", "deepspeed 3"),
        4: ("deepspeed 0", "deepspeed bf16_fp32 1", "deepspeed 2", "deepspeed bf16 3"),
    },
    # Once one engine of a process was cut by AutoTP or has stages, DeepSpeed makes none that is otherwise.
    "cut": {
        2: ("deepspeed cut fp16 0", "deepspeed cut bf16_fp32 1", "deepspeed cut bf16 3"),
        4: ("deepspeed cut fp32 0", "deepspeed cut bf16_fp32 1", "deepspeed cut bf16 2", "deepspeed cut bf16 3"),
    },
    "staged": {
        2: ("deepspeed staged fp32 0", "deepspeed staged fp16 1", "deepspeed staged bf16_fp32 1"),
        4: ("deepspeed staged fp16 0", "deepspeed staged bf16 1", "deepspeed staged bf16_fp32 1"),
    },
}
"""How models are trained, by the number of ranks; models that are whole on a rank, cut by AutoTP, or a pipeline."""

CHECKED_BY_GUARD = (
    "deepspeed 0",
    "deepspeed cut fp32 0",
    "deepspeed cut bf16_fp32 1",
    "deepspeed cut bf16 3",
    "deepspeed staged fp32 0",
)


@dataclass(frozen=True)
class Try:
    """One accident.

    Attributes:
        way: How the model is trained.
        fault: What is planted besides, to be found: "input" or "gradient".
        point: Method of the guard in which it happens.
        accident: What happens.
        call: Number of the method's call, from 1.
        rank: Rank on which it happens.
    """

    way: str
    fault: str
    point: str
    accident: str
    call: int
    rank: int

    def __str__(self) -> str:
        return f"{self.way}, {self.fault}: {self.accident} in call {self.call} of {self.point} on rank {self.rank}"

    @property
    def ends_the_search(self) -> bool:
        """Whether the guard cannot be expected to find what comes later."""
        return self.accident == "detach" or (self.way.startswith("deepspeed") and self.point.endswith("_reduce"))


def tries(world: int, seed: int, model: str = "whole") -> Iterator[Try]:
    """Yields tries without end, the same on all ranks; `model` is a key of `WAYS`."""
    chance = random.Random(f"{world} {seed}")
    ways = WAYS[model][world]
    while True:
        one = Try(
            way=chance.choice(ways),
            fault=chance.choice(("input", "gradient")),
            point=chance.choice(POINTS),
            accident=chance.choice(ACCIDENTS),
            call=chance.choice((1, 1, 2, 3, 5)),
            rank=chance.randrange(world),
        )
        if world > 1 and one.way in CHECKED_BY_GUARD and one.point.endswith("_reduce"):
            continue  # the check of every step, which only the guard makes: if it fails, so does the process group
        if one.accident == "detach" and one.way in FRAMEWORKS:
            continue  # callbacks hold these guards
        yield one


class Planted(Exception):
    """The accident."""


@contextmanager
def happening(one: Try, rank: int, detach: Callable[[], Any]) -> Iterator[list[int]]:
    """Makes it happen inside. Yields a list that holds the number of the call once it has."""
    module, _, path = one.point.partition(":")
    owner = getattr(importlib.import_module(f"hallo_numguard.{module}"), path.split(".")[0])
    name = path.split(".")[1]
    original = getattr(owner, name)
    calls, happened = 0, []

    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == one.call and rank == one.rank:
            happened.append(calls)
            if one.accident == "raise":
                raise Planted(one.point)
            if one.accident == "run out of memory":
                raise torch.OutOfMemoryError(one.point)
            if one.accident == "sleep":
                time.sleep(0.3)
            if one.accident == "detach":
                detach()
        return original(*args, **kwargs)

    setattr(owner, name, changed)
    try:
        yield happened
    finally:
        setattr(owner, name, original)
