"""What a guarded step of a plain optimizer costs, against clipping and stepping as torch does.

    python benchmarks/optimizer_step.py [--quick] [--case fp32-25M-200-fused] [--rounds 15] [--json FILE]

All ways take turns on the same optimizer and gradients, in a new order every round; before each, untimed, the gradients
are put back to what they were. A figure is the median over the rounds of a step over that of `clip_grad_norm_` and
`step` in the same round. No forward or backward pass is timed.

- step: `optimizer.step()` alone, which neither looks nor clips.
- torch: `clip_grad_norm_(parameters, limit)`, and `optimizer.step()`.
- guard: `GuardedOptimizer(optimizer, ...)`, which looks and does not clip.
- guard, clips: with `clip_norm` below the norm: every gradient is scaled.
- guard, within: with `clip_norm` above it, as in most steps of most runs.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from machine import describe_cpu, require_native
from rich.console import Console
from rich.table import Table
from timing import no_collections
from torch import nn

import hallo_numguard as ng

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"25M": 25_000_000, "200M": 200_000_000}
QUICK_SIZE, QUICK_ROUNDS, ROUNDS = 100_000, 3, 15
WARM_UP = 2
LOW, HIGH = 0.5, 1e9  # limits of the norm


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        dtype: Of parameters and gradients.
        size: Number of elements, in a word.
        tensors: How many they are in.
        kind: Of AdamW: foreach or fused.
    """

    dtype: str
    size: str
    tensors: int
    kind: str

    def __str__(self) -> str:
        return f"{self.dtype}-{self.size}-{self.tensors}-{self.kind}"


CASES = [
    Case(dtype, size, tensors, kind)
    for size in SIZES
    for dtype in DTYPES
    for tensors in (1, 200)
    for kind in ("foreach", "fused")
]


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Its name.
        elements: How many there really were.
        rounds: How often.
        torch_ms: Median of clip_grad_norm_ and step.
        ratios: Of each way, the median over the rounds of its time over torch's.
    """

    case: str
    elements: int
    rounds: int
    torch_ms: float
    ratios: dict[str, float]

    @property
    def promise(self) -> str:
        """Whether the guard that clips costs less than clipping alone."""
        kept = max(self.ratios["guard, clips"], self.ratios["guard, within"]) < 1.0
        return "met" if kept else "missed"


Way = Callable[[], object]


class Trained:
    """Parameters with gradients that can be put back, and their optimizer."""

    def __init__(self, case: Case, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]
        sizes = list(_sizes(elements, case.tensors))
        self.parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
        self._gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient.clone()
        options = {case.kind: True}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, **options)  # type: ignore[arg-type]

    def restore(self) -> None:
        """Puts the gradients back."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)

    def ways(self) -> dict[str, Way]:
        """Returns all ways to make a step."""
        named = [(f"p{number}", parameter) for number, parameter in enumerate(self.parameters)]

        def by_torch() -> None:
            nn.utils.clip_grad_norm_(self.parameters, LOW)
            self.optimizer.step()

        return {
            "step": self.optimizer.step,
            "torch": by_torch,
            "guard": ng.GuardedOptimizer(self.optimizer, named).step,
            "guard, clips": ng.GuardedOptimizer(self.optimizer, named, clip_norm=LOW).step,
            "guard, within": ng.GuardedOptimizer(self.optimizer, named, clip_norm=HIGH).step,
        }


def _sizes(elements: int, tensors: int) -> Iterator[int]:
    """Sizes that differ from tensor to tensor, as layers' do."""
    weights = [1 + number % 4 for number in range(tensors)]
    return (max(1, elements * weight // sum(weights)) for weight in weights)


def measure(case: Case, elements: int, rounds: int) -> Result:
    """Times a case."""
    trained = Trained(case, elements)
    ways = trained.ways()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    with no_collections():
        for _ in range(rounds + WARM_UP):
            for way in order.sample(list(ways), len(ways)):
                trained.restore()
                begin = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - begin)
    taken = {way: spent[WARM_UP:] for way, spent in seconds.items()}
    return Result(
        case=str(case),
        elements=sum(parameter.numel() for parameter in trained.parameters),
        rounds=rounds,
        torch_ms=1e3 * statistics.median(taken["torch"]),
        ratios={
            way: statistics.median(mine / theirs for mine, theirs in zip(spent, taken["torch"], strict=True))
            for way, spent in taken.items()
        },
    )


def print_results(console: Console, results: list[Result]) -> None:
    """Prints a row a case."""
    table = Table(title="A step, of clip_grad_norm_ and step", title_justify="left", title_style="bold")
    ways = [way for way in results[0].ratios if way != "torch"] if results else []
    for name in ("case", "torch ms", *ways, "below 1.00"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for one in results:
        table.add_row(one.case, f"{one.torch_ms:.1f}", *[f"{one.ratios[way]:.3f}" for way in ways], one.promise)
    console.print(table)


@click.command(help="Measures steps of AdamW, guarded and clipped, against clip_grad_norm_ and step.")
@click.option("--case", "names", type=click.Choice([str(case) for case in CASES]), multiple=True, help="Repeat.")
@click.option("--rounds", type=click.IntRange(min=1), help="Steps of each way.")
@click.option("--quick", is_flag=True, help="A few small tensors: to see that it works.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Parses the command line, runs, prints and writes."""
    require_native()
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    console = Console(width=120)
    machine = describe_cpu()
    console.print(" | ".join(f"{name}: {value}" for name, value in machine.items()), highlight=False, style="dim")
    results = []
    for case in CASES:
        if not names or str(case) in names:
            results.append(measure(case, QUICK_SIZE if quick else SIZES[case.size], rounds))
            gc.collect()
    print_results(console, results)
    if json_path is not None:
        document = {"machine": machine, "results": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
