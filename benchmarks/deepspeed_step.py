"""What a guard costs: whole training steps of DeepSpeed, without it, observing, and in replace mode.

    python benchmarks/deepspeed_step.py [--quick] [--case fp16-2 --case bf16-2-10000x64] [--rounds 15] [--device cuda]
        [--json FILE]

Three engines of the same model take turns, in a new order every round, so that noise hits all alike; a figure is the
median over the rounds of a guarded step over the unguarded one of the same round. Beside it: what DeepSpeed's own
check and norm take in a step, and in replace mode the guard with what is left of them.

A case is a dtype, a ZeRO stage, where gradients and optimizer state lie, and if it ends in `10000x64` so many
parameters of 64 elements, which show the cost of a parameter; else a stack of 24 Linear(1024, 1024), on a GPU of 24
Linear(2048, 2048). On a GPU a step is timed until its work is done, check and norm until their calls return.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from machine import prepare
from output import device_option, json_option, make_console, print_facts, quick_option, rounds_option, write_json
from page import print_results
from timing import alternate, median_ratio
from torch import nn

import hallo_numguard as ng
from hallo_numguard.integrations.deepspeed import DeepSpeedGuard

MODES = ("off", "observe", "replace")
DTYPES = {"fp16": torch.half, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS, BATCH, ROUNDS = 24, 8, 15
WIDTHS = {"cpu": 1024, "cuda": 2048}  # by device
QUICK_LAYERS, QUICK_WIDTH, QUICK_ROUNDS = 4, 64, 3
SMALL_PARAMETER = 64  # elements
COUNTS = (100, 1_000, 10_000, 100_000)  # the last take minutes

# What DeepSpeed does to find an overflow and a norm, and what the guard does in a step. None calls itself.
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
    """A configuration of DeepSpeed, and a model.

    Attributes:
        dtype: Key of `DTYPES`.
        stage: ZeRO stage.
        offload: Whether gradients and optimizer state lie on the CPU.
        small_parameters: Number of small parameters in place of the Linear layers; 0 for these.
    """

    dtype: str
    stage: int
    offload: bool = False
    small_parameters: int = 0

    def __str__(self) -> str:
        offload = "-offload" if self.offload else ""
        parameters = f"-{self.small_parameters}x{SMALL_PARAMETER}" if self.small_parameters else ""
        return f"{self.dtype}-{self.stage}{offload}{parameters}"


CASES = {
    str(case): case
    for case in (
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
        *[Case("bf16", stage, small_parameters=count) for stage in (0, 2, 3) for count in COUNTS],
    )
}


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Name of the case.
        rounds: Steps of each engine.
        step_ms: Unguarded step, median.
        observe: Step in observe mode over the unguarded one of the same round, median.
        replace: Step in replace mode over the unguarded one of the same round, median.
        theirs_ms: DeepSpeed's check and norm in an unguarded step, median.
        ours_ms: Guard and what is left of DeepSpeed's check and norm in a step in replace mode, median.
    """

    case: str
    rounds: int
    step_ms: float
    observe: float
    replace: float
    theirs_ms: float
    ours_ms: float


class SmallParameters(nn.Module):
    """Many small parameters, and hardly anything else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(8, SMALL_PARAMETER // 8) * 0.1) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reads all of them; `x` has one element a row."""
        return torch.cat([part.flatten() for part in self.parts]) * x


class Stopwatch:
    """Adds up the time that methods of objects take, by a clock; a method that another one calls counts once.

    Args:
        clock: Returns seconds.
        before: Runs before each call, and is not timed.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, before: Callable[[], object] = lambda: None
    ) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._before = before
        self._running = False

    def watch(self, owner: Any, *names: str) -> None:
        """Times these methods of `owner` from now on."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, original: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return original(*args, **kwargs)
            self._running = True
            self._before()
            begin = self._clock()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += self._clock() - begin
                self._running = False

        return timed


class Trained:
    """One engine in one mode, with the passes over its gradients timed."""

    def __init__(self, case: Case, mode: str, layers: int, width: int, stopwatch: Stopwatch | None = None) -> None:
        rows, columns = (1, 1) if case.small_parameters else (BATCH, width)
        self._engine = make_engine(case, layers, width)
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        self._input = values.to(self._engine.device, DTYPES[case.dtype])
        self.stopwatch = stopwatch or Stopwatch()
        optimizer = self._engine.optimizer
        self.stopwatch.watch(optimizer, *[name for name in CHECKS if hasattr(optimizer, name)])
        if mode != "off":
            guard = DeepSpeedGuard(self._engine, ng.GuardConfig(mode=mode), None)
            self.stopwatch.watch(guard, "_scan_gradients")
            self.stopwatch.watch(guard._session, "after_step")
            self.stopwatch.watch(guard._adapter, "begin_step")

    def step(self) -> None:
        """Trains a step, and times this one's passes alone."""
        self.stopwatch.seconds = 0.0
        self._engine.backward(self._engine(self._input).float().square().mean())
        self._engine.step()
        if self._engine.device.type != "cpu":
            torch.cuda.synchronize()


def make_engine(case: Case, layers: int, width: int) -> Any:
    """Returns a DeepSpeed engine of the model of a case."""
    import deepspeed

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    if case.small_parameters:
        model = SmallParameters(case.small_parameters)
    zero: dict[str, Any] = {"stage": case.stage}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0 if case.small_parameters else 1.0,
    }
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    deepspeed.DeepSpeedEngine._check_for_duplicates = _accept_all  # its time grows with the square of the parameters
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _accept_all(*_: object) -> None:
    pass


def measure(case: Case, layers: int, width: int, rounds: int) -> Result:
    """Times a case."""
    engines = {mode: Trained(case, mode, layers, width) for mode in MODES}
    inside: dict[str, list[float]] = {mode: [] for mode in MODES}
    seconds = alternate(
        {mode: engine.step for mode, engine in engines.items()},
        rounds,
        after=lambda mode: inside[mode].append(engines[mode].stopwatch.seconds),
    )
    return Result(
        case=str(case),
        rounds=rounds,
        step_ms=1e3 * statistics.median(seconds["off"]),
        observe=median_ratio(seconds["observe"], seconds["off"]),
        replace=median_ratio(seconds["replace"], seconds["off"]),
        theirs_ms=1e3 * statistics.median(inside["off"]),
        ours_ms=1e3 * statistics.median(inside["replace"]),
    )


def growth(steps: int) -> float:
    """Returns KiB by which the process grows in a guarded step, once the flight recorder is full."""
    engine = Trained(CASES["bf16-2-100x64"], "replace", LAYERS, WIDTHS["cpu"])
    process = psutil.Process()
    for _ in range(2 * ng.GuardConfig().history):
        engine.step()
    before = process.memory_info().rss
    for _ in range(steps):
        engine.step()
    return (process.memory_info().rss - before) / steps / 1024


def let_deepspeed_start(device: str) -> None:
    """Lets deepspeed.initialize start alone, on a CPU in fp16 too, and log less."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    os.environ["DS_ACCELERATOR"] = device
    logging.disable(logging.WARNING)
    if device != "cpu":
        return
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


@click.command()
@click.option(
    "--case",
    "names",
    type=click.Choice(list(CASES)),
    multiple=True,
    default=tuple(name for name, case in CASES.items() if case.small_parameters < COUNTS[-1]),
    help="Repeat.",
)
@click.option(
    "--growth", "growth_steps", type=click.IntRange(min=1), help="Measure the growth of memory in so many steps."
)
@device_option
@rounds_option
@quick_option
@json_option
def main(
    names: tuple[str, ...],
    growth_steps: int | None,
    device: str,
    rounds: int | None,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Measure whole training steps of DeepSpeed, without and with the guard."""
    console, machine = make_console(), prepare(device)
    let_deepspeed_start(device)
    print_facts(console, machine)
    layers, width = (QUICK_LAYERS, QUICK_WIDTH) if quick else (LAYERS, WIDTHS[device])
    results = []
    for name in names:
        results.append(measure(CASES[name], layers, width, rounds or (QUICK_ROUNDS if quick else ROUNDS)))
        gc.collect()
    print_results(console, "deepspeed_step", results)
    write_json(json_path, machine, results)
    if growth_steps is not None:
        console.print(f"growth: {growth(growth_steps):.2f} KiB a step")


if __name__ == "__main__":
    main()
