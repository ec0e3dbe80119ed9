"""What a guard costs for each parameter in a clean step of DeepSpeed, where parameters are many and small.

    python benchmarks/parameter_cost.py [--quick] [--case bf16-2-10000x64] [--rounds 6] [--device cuda]
        [--json FILE]

Cases are those of deepspeed_step.py with parameters of 64 elements. Steps are made until the looks at all weights and
the first samples of the guard are over, then timed. A figure is CPU time of the thread that trains, so that other work
on the machine counts little: the smallest of the steps, in microseconds a parameter. Not counted is what falls to
whoever comes first, and without a guard to DeepSpeed or torch: that the guard lets go of the loss, and that glibc joins
and sorts the small pieces of memory that DeepSpeed has freed, 10,000 of them at each request for 1 KiB or more (15 ms
after a step of 100,000 parameters at stage 2).

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
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import ParameterGradients
from hallo_numguard.integrations.deepspeed.adapters.zero12 import PartitionLists

WARM_UP = 9  # the guard's samples come in steps 1, 2, 4, 8, 16 and every 1024th
ROUNDS, QUICK_ROUNDS = 6, 1
REQUESTS = 64  # for memory, after which glibc has sorted what there is
SMALL = tuple(name for name, case in CASES.items() if case.small_parameters >= 10_000)


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Name of the case.
        parameters: Number of parameters.
        theirs_us: DeepSpeed's check and norm in an unguarded step, a parameter.
        guard_us: Guard and what is left of DeepSpeed's check and norm in a step in replace mode, a parameter.
        listing_us: Of that, reading `.grad` of the parameters, or the list of gradients that DeepSpeed makes in every
            step. 0 where gradients are in flat buffers.
        share: `guard_us` over the whole step.
    """

    case: str
    parameters: int
    theirs_us: float
    guard_us: float
    listing_us: float
    share: float


@dataclass(frozen=True)
class Seconds:
    """CPU time in a step."""

    inside: float
    listing: float
    whole: float


def measure(case: Case, rounds: int) -> Result:
    """Times a case."""
    theirs, ours = _seconds(case, "off", rounds), _seconds(case, "replace", rounds)
    count = case.small_parameters
    theirs_us, guard_us, listing_us = (1e6 * value / count for value in (theirs.inside, ours.inside, ours.listing))
    return Result(str(case), count, theirs_us, guard_us, listing_us, ours.inside / ours.whole)


def _seconds(case: Case, mode: str, rounds: int) -> Seconds:
    """The smallest of each."""
    stopwatch = Stopwatch(time.thread_time, before=_let_the_allocator_tidy_up)
    engine = Trained(case, mode, layers=0, width=0, stopwatch=stopwatch)
    freeing, listing = Stopwatch(time.thread_time), Stopwatch(time.thread_time)
    freeing.watch(PendingStep, "forget_losses")
    for source in (ParameterGradients, PartitionLists):
        listing.watch(source, "_listed")
    for _ in range(WARM_UP):
        engine.step()
    inside, listed, whole = [], [], []
    for _ in range(rounds):
        freeing.seconds = listing.seconds = 0.0
        began = time.thread_time()
        engine.step()
        whole.append(time.thread_time() - began)
        inside.append(engine.stopwatch.seconds - freeing.seconds)
        listed.append(listing.seconds)
    gc.collect()
    return Seconds(min(inside), min(listed), min(whole))


def _let_the_allocator_tidy_up() -> None:
    for _ in range(REQUESTS):
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
