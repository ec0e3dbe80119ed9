"""What the guard itself takes in a clean step, by the number of parameters; and what it holds after many steps.

    python benchmarks/guard_cost.py [--count 100 --count 1000] [--stage 2] [--steps 30]

Parameters of 64 elements each, so that the cost a parameter shows and not that of reading them. A figure is the median
over the steps of all the time inside of the guard: the scan, the flight recorder, the watch, and the answers that it
gives in DeepSpeed's place, of which DeepSpeed's own cost is on the same line.

Exit code: 0 done, 2 no native extension.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import click
import torch
from deepspeed_step import CHECKS, Stopwatch, prepare
from machine import require_native
from rich.console import Console
from rich.table import Table
from timing import no_collections
from torch import nn

import hallo_numguard as ng
from hallo_numguard.integrations.deepspeed import DeepSpeedGuard

SIZE = 64


class Many(nn.Module):
    """Many small parameters, and hardly anything else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(8, SIZE // 8) * 0.1) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reads all of them."""
        return torch.cat([part.flatten() for part in self.parts]).mul(x).square().mean()


def make_engine(count: int, stage: int) -> Any:
    """Returns an engine of that many parameters."""
    import deepspeed

    torch.manual_seed(0)
    model = Many(count)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def step_of(engine: Any) -> None:
    """Trains a step."""
    engine.backward(engine(torch.ones((), dtype=torch.bfloat16)))
    engine.step()


def measure(count: int, stage: int, steps: int) -> tuple[float, float, float]:
    """Returns milliseconds in a step inside of the guard, and of DeepSpeed's check and norm; and MiB that it holds."""
    plain = make_engine(count, stage)
    theirs = Stopwatch()
    for name in CHECKS:
        if hasattr(plain.optimizer, name):
            theirs.watch(plain.optimizer, name)
    engine = make_engine(count, stage)
    guard = DeepSpeedGuard(engine, ng.GuardConfig(), None)
    ours = Stopwatch()
    for owner, name in ((guard, "_before_step"), (guard, "_after_step"), (guard._session, "saw_call")):
        ours.watch(owner, name)
    for name in CHECKS:
        if hasattr(engine.optimizer, name):
            ours.watch(engine.optimizer, name)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with no_collections():
        for step in range(steps):
            step_of(plain)
            step_of(engine)
            taken = ours.take(), theirs.take()
            if step >= 2 and not _is_sampled(step + 1):
                seconds["ours"].append(taken[0])
                seconds["theirs"].append(taken[1])
    held = sum(table.nbytes for table, _ in guard._session._recorder._tables) / 2**20
    guard.detach()
    return 1e3 * statistics.median(seconds["ours"]), 1e3 * statistics.median(seconds["theirs"]), held


def growth(count: int, stage: int, steps: int) -> float:
    """Returns KiB by which the process grows in a guarded step, once the flight recorder is full."""
    engine = make_engine(count, stage)
    guard = ng.attach(engine, ng.GuardConfig(history=32))
    for _ in range(100):
        step_of(engine)
    before = _resident()
    for _ in range(steps):
        step_of(engine)
    guard.detach()
    return (_resident() - before) / steps / 1024


def _is_sampled(step: int) -> bool:
    """Steps 1, 2, 4 ... cost more, and are few."""
    return step & (step - 1) == 0


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@click.command(help="Measures what the guard itself takes in a clean step.")
@click.option("--count", "counts", type=click.IntRange(min=1), multiple=True, default=(100, 1000, 10_000, 100_000))
@click.option("--stage", "stages", type=click.IntRange(1, 3), multiple=True, default=(2, 3))
@click.option("--steps", type=click.IntRange(min=4), default=12)
def main(counts: tuple[int, ...], stages: tuple[int, ...], steps: int) -> None:
    """Parses the command line, runs and prints."""
    require_native()
    prepare()
    table = Table(title="The guard's own part of a clean step", title_justify="left", title_style="bold")
    for name in ("stage", "parameters", "guard ms", "us a parameter", "DeepSpeed's check + norm ms", "history MiB"):
        table.add_column(name, justify="right")
    for stage in stages:
        for count in counts:
            ours, theirs, held = measure(count, stage, steps)
            table.add_row(
                str(stage), f"{count:,}", f"{ours:.2f}", f"{1e3 * ours / count:.2f}", f"{theirs:.2f}", f"{held:.1f}"
            )
    console = Console(width=120)
    console.print(table)
    console.print(f"growth a step, 100 parameters, 1,000 steps: {growth(100, 2, 1000):.2f} KiB")


if __name__ == "__main__":
    main()
