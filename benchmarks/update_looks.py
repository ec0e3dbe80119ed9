"""What the looks at the weights around an update cost, against a whole step of training.

    python benchmarks/update_looks.py [--quick] [--rounds 9] [--json FILE]

A step of a transformer (forward, backward, AdamW) and the two looks that the guard makes in such a step take turns. A
figure is the median over the rounds of the looks over the step of the same round.

- part: what `GuardConfig(check_updates="part")` reads once the first steps are over.
- all: `check_updates="all"`: every weight, right before the update and right after it.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from machine import prepare
from output import json_option, make_console, print_facts, print_table, quick_option, rounds_option, write_json
from timing import Call, alternate, median_ratio
from torch import nn

from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.named_tensors import named_parameters
from hallo_numguard.guard.optimizer_view import view_of
from hallo_numguard.guard.step.updates import FULL_STEPS, UpdateWatch
from hallo_numguard.ops.table import StatsTable

ROUNDS, QUICK_ROUNDS = 9, 2
WIDTH, LAYERS, TOKENS = 512, 8, 1024
QUICK_WIDTH, QUICK_LAYERS, QUICK_TOKENS = 32, 2, 16


@dataclass(frozen=True)
class Result:
    """What a mode gave.

    Attributes:
        mode: Value of `check_updates`.
        rounds: Steps.
        parameters: Number of weights, in millions.
        step_ms: Time of a step, median.
        looks_ms: Time of both looks, median.
        ratio: Time of the looks over that of the step in the same round, median.
    """

    mode: str
    rounds: int
    parameters: float
    step_ms: float
    looks_ms: float
    ratio: float


class Run:
    """A model in training."""

    def __init__(self, width: int, layers: int, tokens: int) -> None:
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, dropout=0.0)
        self._model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(max(1, tokens // 256), min(tokens, 256), width)
        self.elements = sum(parameter.numel() for parameter in self._model.parameters())
        self._steps = 0

    def step(self) -> None:
        """Makes a step without a guard."""
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()

    def looks(self, mode: str) -> Call:
        """Returns a call that makes the two looks of a step."""
        watch = UpdateWatch(
            GuardedModel(
                named_parameters(self._model),
                [],
                sliced_gradients=False,
                scan_state=lambda: ScannedPieces(StatsTable.empty(), ()),
                sliced_state=False,
                device=torch.device("cpu"),
                optimizer=view_of(self._optimizer),
            ),
            mode,
        )

        def look() -> None:
            self._steps += 1
            watch.before(self._steps, None)
            watch.after(self._steps)

        for _ in range(FULL_STEPS):
            look()
        return look


@click.command()
@rounds_option
@quick_option
@json_option
def main(rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure the looks around an update against a step of training."""
    console, machine = make_console(), prepare()
    print_facts(console, machine)
    run = Run(QUICK_WIDTH, QUICK_LAYERS, QUICK_TOKENS) if quick else Run(WIDTH, LAYERS, TOKENS)
    count = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    modes = ("part", "all")
    seconds = alternate({"step": run.step, **{mode: run.looks(mode) for mode in modes}}, count)
    results = [
        Result(
            mode,
            count,
            run.elements / 1e6,
            1e3 * statistics.median(seconds["step"]),
            1e3 * statistics.median(seconds[mode]),
            median_ratio(seconds[mode], seconds["step"]),
        )
        for mode in modes
    ]
    rows = [[item.mode, f"{item.step_ms:.1f}", f"{item.looks_ms:.3f}", f"{item.ratio:.5f}"] for item in results]
    print_table(console, "Looks around an update", ["check_updates", "step ms", "looks ms", "ratio"], rows)
    write_json(json_path, machine, results)


if __name__ == "__main__":
    main()
