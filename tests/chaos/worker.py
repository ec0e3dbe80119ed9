"""One rank: makes one try after another, the same as the other ranks, and prints what was wrong.

The environment variable CHAOS holds seed, tries to leave out, tries to make, and the kind of models, a key of `WAYS`.
"""

from __future__ import annotations

import datetime
import faulthandler
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hallo_numguard as ng
from chaos.tries import FRAMEWORKS, Try, happening, tries

RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])
STEPS = 8
BAD_STEPS = (3, 6)
LONGEST_TRY_SECONDS = 100
WARN = ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000)


class Model(nn.Module):
    """A small model with a loss, and with statistics that a bad batch poisons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x))))).square().mean()


def batch(step: int, fault: str, way: str) -> torch.Tensor:
    copies = 2 if "cut" in way else 1  # ranks that have the same batch
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step * 10 + RANK // copies))
    if fault == "input" and step in BAD_STEPS and WORLD - copies <= RANK:
        x[0, 0] = float("nan")
    return x


def damage_of(step: int, fault: str) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What a pipeline's batch has in a bad step."""
    return (lambda x, _: x[0, 0].fill_(float("nan"))) if fault == "input" and step in BAD_STEPS else None


class Run:
    """A training run, guarded.

    Attributes:
        guard: The guard.
        model: The user's model.
        train_step: Makes one step, given its number and the fault.
        inject: Plants a bad gradient in the next step.
        weights: Returns the weights. Running statistics stay poisoned where the part that puts them back was hit.
    """

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Model()
        self.weights = lambda: [parameter.detach().clone() for parameter in self.model.parameters()]
        config = ng.GuardConfig(policy=WARN, local_gradients="always")
        self.inject = lambda: ng.inject(self.model, "gradient", "first.weight", rank=WORLD - 1)
        self.train_step: Callable[[int, str], None]
        if "staged" in way:
            import pipelines

            engine = pipelines.make_engine(way.split()[-2], int(way.split()[-1]))
            self.model, self.guard = engine.module, ng.attach(engine, config)
            self.inject = lambda: ng.inject(engine, "gradient", "3.up.weight", rank=WORLD - 1)
            self.train_step = lambda step, fault: pipelines.step(engine, step, damage_of(step, fault))
        elif way.startswith("deepspeed"):
            import deepspeed_support as support

            *words, stage = way.split()[1:]
            setup = words[-1] if words and words[-1] != "cut" else "fp32"
            import tensor_parallel

            # Batch normalisation has no bfloat16 on a CPU.
            model = self.model if setup == "fp32" and "cut" not in words else tensor_parallel.Regression()
            if "cut" in words:
                engine = tensor_parallel.make_engine(setup, int(stage), model=model)
            else:
                engine = support.make_engine(setup, stage=int(stage), model=model)
            self.model, self.guard = engine.module, ng.attach(engine, config)
            self.weights = lambda: list(support.weights(engine).values())
            self.train_step = lambda *step: self._engine_step(engine, batch(*step, way))
        elif way == "accelerate":
            import accelerate

            accelerator = accelerate.Accelerator(cpu=True)
            called, optimizer = accelerator.prepare(self.model, torch.optim.SGD(self.model.parameters(), 0.1))
            self.guard = ng.attach(accelerator, config)
            self.train_step = lambda *step: self._step(
                optimizer, lambda: accelerator.backward(called(batch(*step, way)))
            )
        else:
            called = DistributedDataParallel(self.model) if WORLD > 1 else self.model
            self.guard = ng.GuardedOptimizer(torch.optim.SGD(self.model.parameters(), 0.1), called, config)
            self.train_step = lambda *step: self._step(self.guard, lambda: called(batch(*step, way)).backward())

    @staticmethod
    def _step(optimizer: Any, backward: Callable[[], None]) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    @staticmethod
    def _engine_step(engine: Any, x: torch.Tensor) -> None:
        engine.backward(engine(x))
        engine.step()

    def go(self, fault: str) -> None:
        """Makes all steps."""
        for step in range(1, STEPS + 1):
            if fault == "gradient" and step in BAD_STEPS:
                self.inject()
            self.train_step(step, fault)


def framework_run(one: Try) -> tuple[list[str], Any]:
    """Trains with a framework's own Trainer, with one bad batch; returns what was wrong."""
    import frameworks

    framework = frameworks.FRAMEWORKS[one.way]
    faulty = framework.faulty("input")
    with tempfile.TemporaryDirectory() as folder, happening(one, RANK, lambda: None) as happened:
        outcome = framework.train(faulty, Path(folder))
    wrong = ["the run was stopped"] if outcome.raised else []
    if not one.ends_the_search and not faulty.reports:
        wrong.append("the bad batch was not found")
    return wrong, happened


def own_run(one: Try, baseline: Callable[[str, str], list[torch.Tensor]]) -> tuple[list[str], Any]:
    run = Run(one.way)
    with happening(one, RANK, run.guard.detach) as happened:
        run.go(one.fault)
    wrong = []
    if not one.ends_the_search:
        expected = baseline(one.way, one.fault)
        if not all(map(torch.equal, run.weights(), expected)):
            wrong.append("other weights than without the accident")
        report = run.guard.last_report
        if report is None or report.step != BAD_STEPS[-1]:
            wrong.append(f"the last bad step was not found, but {report and report.step}")
    run.guard.detach()
    return wrong, happened


def main(seed: int, first: int, count: int, model: str) -> None:
    """Makes tries, the same on all ranks."""
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    warnings.filterwarnings("ignore")
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    baselines: dict[tuple[str, str], list[torch.Tensor]] = {}

    def baseline(way: str, fault: str) -> list[torch.Tensor]:
        if (way, fault) not in baselines:
            run = Run(way)
            run.go(fault)
            baselines[way, fault] = run.weights()
            run.guard.detach()
        return baselines[way, fault]

    hit = 0
    for one in itertools.islice(tries(WORLD, seed, model), first, first + count):
        faulthandler.dump_traceback_later(LONGEST_TRY_SECONDS, exit=True)
        sys.stderr.write(f"rank {RANK}: {one}\n")  # the last one, if a rank dies
        try:
            is_framework = one.way in FRAMEWORKS
            wrong, happened = framework_run(one) if is_framework else own_run(one, baseline)
            hit += bool(happened)
        except Exception as error:  # noqa: BLE001 - whatever came out of the run is what is wrong
            wrong = [f"{type(error).__name__} came out of the run: {error}"[:300]]
        faulthandler.cancel_dump_traceback_later()
        for what in wrong:
            print(json.dumps({"try": str(one), "wrong": what}), file=results, flush=True)
    print(json.dumps({"hit": hit}), file=results, flush=True)


if __name__ == "__main__":
    seed, first, count, model = os.environ["CHAOS"].split()
    main(int(seed), int(first), int(count), model)
