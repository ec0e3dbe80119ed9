"""What a guard costs for each parameter in a clean step of DeepSpeed, where parameters are many and small.

    python benchmarks/parameter_cost.py [--quick] [--case bf16-2-10000x64] [--rounds 6] [--device cuda]
        [--json FILE]

Cases are those of deepspeed_step.py with parameters of 64 elements. Steps are made until the looks at all weights and
the first samples of the guard are over, then timed. A figure is CPU time of the thread that trains, so that other work
on the machine counts little: the smallest of the steps, in microseconds a parameter. Not counted is what falls to
whoever comes first, and without a guard to DeepSpeed or torch: that the guard lets go of the loss, and that glibc joins
all small pieces of memory that DeepSpeed has freed, at the next request for 1 KiB or more (1.2 ms after a step of
10,000 parameters at stage 2).

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from deepspeed_step import CASES, Case, Stopwatch, Trained, let_deepspeed_start
from machine import prepare
from output import device_option, json_option, make_console, print_facts, quick_option, rounds_option, write_json
from page import print_results

from hallo_numguard.guard.step.pending import PendingStep

WARM_UP = 9  # the guard's samples come in steps 1, 2, 4, 8, 16 and every hundredth
ROUNDS, QUICK_ROUNDS = 6, 1
SMALL = tuple(name for name, case in CASES.items() if case.small_parameters >= 10_000)


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Name of the case.
        parameters: Number of parameters.
        theirs_us: DeepSpeed's check and norm in an unguarded step, a parameter.
        guard_us: Guard and what is left of DeepSpeed's check and norm in a step in replace mode, a parameter.
        share: Guard and that, over the whole step.
    """

    case: str
    parameters: int
    theirs_us: float
    guard_us: float
    share: float


def measure(case: Case, rounds: int) -> Result:
    """Times a case."""
    theirs, _ = _times(case, "off", rounds)
    ours, share = _times(case, "replace", rounds)
    count = case.small_parameters
    return Result(str(case), count, 1e6 * theirs / count, 1e6 * ours / count, share)


def _times(case: Case, mode: str, rounds: int) -> tuple[float, float]:
    """Seconds in what is timed in a step, and its share of the whole step."""
    stopwatch = Stopwatch(time.thread_time, before=_let_the_allocator_tidy_up)
    engine = Trained(case, mode, layers=0, width=0, stopwatch=stopwatch)
    freeing = Stopwatch(time.thread_time)
    freeing.watch(PendingStep, "forget_losses")
    for _ in range(WARM_UP):
        engine.step()
    inside, whole = [], []
    for _ in range(rounds):
        freeing.seconds = 0.0
        began = time.thread_time()
        engine.step()
        whole.append(time.thread_time() - began)
        inside.append(engine.stopwatch.seconds - freeing.seconds)
    gc.collect()
    return min(inside), min(inside) / min(whole)


def _let_the_allocator_tidy_up() -> None:
    torch.empty(1 << 16, dtype=torch.uint8)


@click.command()
@click.option("--case", "names", type=click.Choice(list(CASES)), multiple=True, default=SMALL, help="Repeat.")
@device_option
@rounds_option
@quick_option
@json_option
def main(names: tuple[str, ...], device: str, rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure what a guard costs for each parameter of a clean step of DeepSpeed."""
    console, machine = make_console(), prepare(device)
    let_deepspeed_start(device)
    print_facts(console, machine)
    results = []
    for name in names:
        results.append(measure(CASES[name], rounds or (QUICK_ROUNDS if quick else ROUNDS)))
        write_json(json_path, machine, results)  # the last cases take minutes
        gc.collect()
    print_results(console, "parameter_cost", results)


if __name__ == "__main__":
    main()
