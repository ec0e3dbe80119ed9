"""What a guard costs: whole training steps of DeepSpeed, without it, observing, and in replace mode.

    python benchmarks/deepspeed_step.py [--quick] [--case fp16-2 --case bf16-3-offload] [--json FILE]

Three engines of the same model take turns, in a new order every round, so that noise hits all alike; a figure is the
median over the rounds of a guarded step over the unguarded one of the same round. Beside it: what DeepSpeed's own
check and norm take in a step, and what the guard's pass and answers take in their place.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import click
import torch
from machine import describe_cpu, require_native
from rich.console import Console
from rich.table import Table
from timing import no_collections
from torch import nn

import hallo_numguard as ng
from hallo_numguard.integrations.deepspeed import DeepSpeedGuard

MODES = ("off", "observe", "replace")
LAYERS, WIDTH, BATCH, ROUNDS = 24, 1024, 8, 15
QUICK_LAYERS, QUICK_WIDTH, QUICK_ROUNDS = 4, 64, 3

# What DeepSpeed does to find an overflow and a norm, by the instance that does it.
CHECKS = (
    "has_overflow_partitioned_grads_serial",
    "has_overflow",
    "get_grad_norm_direct",
    "update_offload_overflow_tracker",
    "set_norm_for_param_grad",
    "set_norm_for_param_grad_in_gpu",
    "complete_grad_norm_calculation_for_cpu_offload",
    "_constant_buffered_norm2",
)


@dataclass(frozen=True)
class Case:
    """A configuration of DeepSpeed.

    Attributes:
        setup: fp16, bf16 or fp32.
        stage: Of ZeRO.
        offload: Whether gradients and optimizer state lie on the CPU.
    """

    setup: str
    stage: int
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.setup}-{self.stage}{'-offload' if self.offload else ''}"

    @property
    def has_something_to_replace(self) -> bool:
        """Whether DeepSpeed makes a pass of its own that the guard's can stand in for."""
        return self.stage > 0


CASES = [
    Case("fp32", 0),
    Case("fp16", 1),
    Case("fp16", 2),
    Case("bf16", 2),
    Case("fp16", 2, offload=True),
    Case("bf16", 2, offload=True),
    Case("fp16", 3),
    Case("bf16", 3),
    Case("fp16", 3, offload=True),
    Case("bf16", 3, offload=True),
]


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Its name.
        parameters: Of the model.
        rounds: How often.
        step_ms: Median unguarded step.
        observe, replace: Median of a guarded step over the unguarded one of the same round.
        theirs_ms, ours_ms: In a step: DeepSpeed's check and norm, unguarded; the guard's pass, and what is left of
            DeepSpeed's, in replace mode.
    """

    case: str
    parameters: int
    rounds: int
    step_ms: float
    observe: float
    replace: float
    theirs_ms: float
    ours_ms: float

    @property
    def promise(self) -> str:
        """What was promised of it, and whether it holds."""
        limit = 1.00 if self.theirs_ms > 0 else 1.01
        kept = [self.replace <= limit, self.observe <= 1.02]
        if self.theirs_ms > 0:
            kept.append(self.ours_ms * 10 <= self.theirs_ms)
        names = [f"replace <= {limit:.2f}", "observe <= 1.02", "10x cheaper"]
        return ", ".join(f"{name} {'met' if good else 'missed'}" for name, good in zip(names, kept, strict=False))


class Stopwatch:
    """Adds up the time that an object's methods take; a method that another one calls counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = False

    def watch(self, owner: Any, name: str) -> None:
        """Times `owner.name` from now on."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return original(*args, **kwargs)
            self._running = True
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self._running = False

        setattr(owner, name, timed)

    def take(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class Contestant:
    """One engine in one mode."""

    step: Callable[[], None]
    watch: Stopwatch


def contestant(case: Case, mode: str, layers: int, width: int, batch: int) -> Contestant:
    """Returns an engine that trains, with the passes over its gradients timed."""
    engine = make_engine(case, layers, width, batch)
    watch = Stopwatch()
    for name in CHECKS:
        if hasattr(engine.optimizer, name):
            watch.watch(engine.optimizer, name)
    if mode != "off":
        guard = DeepSpeedGuard(engine, ng.GuardConfig(mode=mode), None)
        watch.watch(guard, "_before_step")
        if guard._replacement is not None:
            watch.watch(guard._replacement, "begin")
    dtype = {"fp16": torch.half, "bf16": torch.bfloat16, "fp32": torch.float32}[case.setup]
    batch_input = torch.randn(batch, width, generator=torch.Generator().manual_seed(0)).to(dtype)

    def step() -> None:
        loss = engine(batch_input).float().square().mean()
        engine.backward(loss)
        engine.step()

    return Contestant(step, watch)


def make_engine(case: Case, layers: int, width: int, batch: int) -> Any:
    """Returns a DeepSpeed engine of a stack of Linear layers."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    zero: dict[str, Any] = {"stage": case.stage}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
    }
    if case.setup == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    if case.setup == "bf16":
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def measure(case: Case, layers: int, width: int, batch: int, rounds: int) -> Result:
    """Times a case."""
    engines = {mode: contestant(case, mode, layers, width, batch) for mode in MODES}
    for engine in engines.values():
        for _ in range(2):
            engine.step()
        engine.watch.take()
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    inside: dict[str, list[float]] = {mode: [] for mode in MODES}
    order = random.Random(0)
    with no_collections():
        for _ in range(rounds):
            modes = list(MODES)
            order.shuffle(modes)
            for mode in modes:
                begin = time.perf_counter()
                engines[mode].step()
                seconds[mode].append(time.perf_counter() - begin)
                inside[mode].append(engines[mode].watch.take())
    ratios = {
        mode: statistics.median(guarded / plain for guarded, plain in zip(seconds[mode], seconds["off"], strict=True))
        for mode in ("observe", "replace")
    }
    return Result(
        case=str(case),
        parameters=layers * (width * width + width),
        rounds=rounds,
        step_ms=1e3 * statistics.median(seconds["off"]),
        observe=ratios["observe"],
        replace=ratios["replace"],
        theirs_ms=1e3 * statistics.median(inside["off"]),
        ours_ms=1e3 * statistics.median(inside["replace"]),
    )


def prepare() -> None:
    """Lets deepspeed.initialize start alone on a CPU, in fp16 too, and say less."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    logging.disable(logging.WARNING)
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Fp16CpuAccelerator(CPU_Accelerator):  # type: ignore[misc]
        """DeepSpeed asks the CPU for a fast path to fp16, not for a right one."""

        def is_fp16_supported(self) -> bool:
            return True

        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.float, torch.half, torch.bfloat16]

        def create_op_builder(self, class_name: str) -> Any:
            return None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)

    set_accelerator(Fp16CpuAccelerator())


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Prints a row a case."""
    table = Table(title="Guarded steps", title_justify="left", title_style="bold")
    for name in ("case", "step ms", "observe", "replace", "their check + norm ms", "ours ms", "times cheaper", ""):
        table.add_column(name, justify="left" if name in ("case", "") else "right")
    for one in results:
        cheaper = f"{one.theirs_ms / one.ours_ms:.1f}" if one.theirs_ms > 0 else "-"
        table.add_row(
            one.case,
            f"{one.step_ms:.0f}",
            f"{one.observe:.3f}",
            f"{one.replace:.3f}",
            f"{one.theirs_ms:.2f}",
            f"{one.ours_ms:.2f}",
            cheaper,
            one.promise,
        )
    console.print(table)


@click.command(help="Measures whole training steps of DeepSpeed, without and with the guard.")
@click.option("--case", "names", type=click.Choice([str(case) for case in CASES]), multiple=True, help="Repeat.")
@click.option("--rounds", type=click.IntRange(min=1), help="Steps of each engine.")
@click.option("--quick", is_flag=True, help="A small model: to see that it works.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Parses the command line, runs, prints and writes."""
    require_native()
    prepare()
    layers, width = (QUICK_LAYERS, QUICK_WIDTH) if quick else (LAYERS, WIDTH)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    console = Console(width=160)
    machine = describe_cpu()
    console.print(" | ".join(f"{name}: {value}" for name, value in machine.items()), highlight=False, style="dim")
    results = []
    for case in CASES:
        if not names or str(case) in names:
            results.append(measure(case, layers, width, BATCH, rounds))
            gc.collect()
    print_results(console, results)
    if json_path is not None:
        document = {"machine": machine, "results": [asdict(result) for result in results]}
        json_path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
