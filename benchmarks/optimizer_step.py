"""What a guarded step of a plain optimizer costs, against clipping and stepping as torch does.

    python benchmarks/optimizer_step.py [--quick] [--case fp32-25M-200-fused] [--rounds 15] [--device cuda]
        [--json FILE]

All ways take turns on the same optimizer and gradients, in a new order every round; before each, untimed, the gradients
are put back to what they were. A figure is the median over the rounds of a step over that of `clip_grad_norm_` and
`step` in the same round. No forward or backward pass is timed.

- step: `optimizer.step()` alone, which neither checks nor clips.
- torch: `clip_grad_norm_(parameters, limit)`, and `optimizer.step()`.
- guard: `GuardedOptimizer(optimizer, ...)`, which checks and does not clip.
- guard, clips: with `clip_norm` below the norm: every gradient is scaled.
- guard, within: with `clip_norm` above it, as in most steps of most runs.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from machine import prepare
from output import device_option, json_option, make_console, print_facts, quick_option, rounds_option, write_json
from page import print_results
from timing import Call, alternate, median_ratio
from torch import nn

import hallo_numguard as ng

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"25M": 25_000_000, "200M": 200_000_000}
QUICK_SIZE, QUICK_ROUNDS, ROUNDS = 100_000, 3, 15
LOW_LIMIT, HIGH_LIMIT = 0.5, 1e9  # below and above the norm


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        dtype: Key of `DTYPES`, for parameters and gradients.
        size: Key of `SIZES`: elements in all.
        tensors: Number of parameters.
        kind: Implementation of AdamW, "foreach" or "fused".
    """

    dtype: str
    size: str
    tensors: int
    kind: str

    def __str__(self) -> str:
        return f"{self.dtype}-{self.size}-{self.tensors}-{self.kind}"


CASES = {
    str(case): case
    for case in (
        Case(dtype, size, tensors, kind)
        for size in SIZES
        for dtype in DTYPES
        for tensors in (1, 200)
        for kind in ("foreach", "fused")
    )
}


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Name of the case.
        rounds: Steps of each way.
        torch_ms: Time of clip_grad_norm_ and step, median.
        ratios: Time of each way over torch's, median over the rounds, by name.
    """

    case: str
    rounds: int
    torch_ms: float
    ratios: dict[str, float]


class Trained:
    """Parameters with gradients that can be put back, and their optimizer."""

    def __init__(self, case: Case, elements: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [1 + number % 4 for number in range(case.tensors)]  # sizes differ, as those of layers do
        sizes = [max(1, elements * weight // sum(weights)) for weight in weights]
        self._parameters = [nn.Parameter(torch.zeros(size, dtype=DTYPES[case.dtype], device=device)) for size in sizes]
        self._gradients = [torch.randn(size, generator=generator).to(device, DTYPES[case.dtype]) for size in sizes]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient.clone()
        options = {case.kind: True}
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, **options)  # type: ignore[arg-type]

    def restore(self) -> None:
        """Puts the gradients back, and waits until they are."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        self._finish()

    def ways(self) -> dict[str, Call]:
        """Returns all ways to make a step, by name."""
        named = [(f"p{number}", parameter) for number, parameter in enumerate(self._parameters)]
        optimizer = self._optimizer

        def clip_and_step() -> None:
            nn.utils.clip_grad_norm_(self._parameters, LOW_LIMIT)
            optimizer.step()

        ways = {
            "step": optimizer.step,
            "torch": clip_and_step,
            "guard": ng.GuardedOptimizer(optimizer, named).step,
            "guard, clips": ng.GuardedOptimizer(optimizer, named, clip_norm=LOW_LIMIT).step,
            "guard, within": ng.GuardedOptimizer(optimizer, named, clip_norm=HIGH_LIMIT).step,
        }
        return {name: self._whole(call) for name, call in ways.items()}

    def _whole(self, call: Call) -> Call:
        """Returns a call that ends when its work is done."""

        def whole() -> None:
            call()
            self._finish()

        return whole if self._gradients[0].is_cuda else call

    def _finish(self) -> None:
        if self._gradients[0].is_cuda:
            torch.cuda.synchronize()


def measure(case: Case, elements: int, rounds: int, device: str) -> Result:
    """Times a case."""
    trained = Trained(case, elements, device)
    seconds = alternate(trained.ways(), rounds, prepare=trained.restore)
    ratios = {way: median_ratio(taken, seconds["torch"]) for way, taken in seconds.items()}
    return Result(str(case), rounds, 1e3 * statistics.median(seconds["torch"]), ratios)


@click.command()
@click.option("--case", "names", type=click.Choice(list(CASES)), multiple=True, default=tuple(CASES), help="Repeat.")
@device_option
@rounds_option
@quick_option
@json_option
def main(names: tuple[str, ...], device: str, rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure steps of AdamW, guarded and clipped, against clip_grad_norm_ and step."""
    console, machine = make_console(), prepare(device)
    print_facts(console, machine)
    results = []
    for name in names:
        size = QUICK_SIZE if quick else SIZES[CASES[name].size]
        results.append(measure(CASES[name], size, rounds or (QUICK_ROUNDS if quick else ROUNDS), device))
        gc.collect()
    print_results(console, "optimizer_step", results)
    write_json(json_path, machine, results)


if __name__ == "__main__":
    main()
