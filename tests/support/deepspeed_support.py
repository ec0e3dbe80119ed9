"""Real DeepSpeed engines: a small model, its configuration, and runs of several processes.

On the CPU, or on the accelerator that DS_ACCELERATOR names.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import tells_failures
from paths import IMPORTABLE

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "1")  # else stage 3 starts numactl in every reduction, to count devices

import pytest
import torch
from torch import nn

DEVICE = torch.device(os.environ["DS_ACCELERATOR"])


class Model(nn.Module):
    """Embedding (one row is never read), frozen projection, tied output, a mask that holds -Inf on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.hidden = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.output = nn.Linear(24, 16)
        self.head = nn.Linear(16, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embedding(tokens))
        x = x + self.output(torch.tanh(self.norm(self.hidden(x))))
        return self.head(x)[..., :7]  # row 7 of the embedding is multiplied, but no loss depends on it


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Returns what a launcher would tell a process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}}


def single_process_environment() -> None:
    """Lets deepspeed.initialize start alone, on a free port."""
    for name, value in rank_environment(0, 1, free_port()).items():
        os.environ.setdefault(name, value)


def allow_fp16() -> None:
    """DeepSpeed asks the CPU for a fast path to fp16, not for a right one; and it need not compile its shared-memory
    collective for tests. Other accelerators are what they are."""
    if DEVICE.type != "cpu":
        return
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Fp16CpuAccelerator(CPU_Accelerator):
        def is_fp16_supported(self) -> bool:
            return True

        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.float, torch.half, torch.bfloat16]

        def create_op_builder(self, class_name: str) -> Any:
            return None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)

    if type(get_accelerator()).__name__ != "Fp16CpuAccelerator":
        set_accelerator(Fp16CpuAccelerator())


def trained_by(model: nn.Module) -> list[Any]:
    """Returns the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(groups: list[Any]) -> torch.optim.Optimizer:
    """Returns an AdamW."""
    return torch.optim.AdamW(groups, lr=1e-3)


def make_engine(
    setup: str = "fp16",
    scale_power: int = 8,
    stage: int = 2,
    offload: bool = False,
    model: nn.Module | None = None,
    groups_of: Callable[[nn.Module], list[Any]] = trained_by,
    optimizer_of: Callable[[list[Any]], torch.optim.Optimizer] = adamw,
    mpu: Any = None,
    **config: Any,
) -> Any:
    """Returns an engine.

    Args:
        setup: fp16 (DeepSpeed's block), half (its block off, half parameters), bf16, bf16_fp32 (gradients in float32)
            or fp32; fp16_fused and bf16_fused with an optimizer that DeepSpeed takes for its own FusedAdam, so that it
            builds FP16_Optimizer and compiles nothing.
        scale_power: Where a dynamic loss scale begins.
        stage: Of ZeRO.
        offload: Whether the optimizer's state lies on the CPU.
        model: A `Model` if left out.
        groups_of: Makes the optimizer's parameters or groups of the model.
        optimizer_of: Makes the optimizer of them.
        mpu: The client's own tensor parallelism.
        config: More of DeepSpeed's configuration.
    """
    single_process_environment()
    allow_fp16()
    import deepspeed

    torch.manual_seed(0)
    model = Model() if model is None else model
    scaler = {"initial_scale_power": scale_power, "hysteresis": 1, "min_loss_scale": 1, "loss_scale_window": 100}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 500, "allgather_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }
    if setup == "half":
        model.half()
        settings["fp16"] = {"enabled": False, **scaler}
    elif setup.startswith("fp16"):
        settings["fp16"] = {"enabled": True, "loss_scale": 0, **scaler}
    elif setup.startswith("bf16"):
        settings.setdefault("bf16", {"enabled": True})
    if setup == "bf16_fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:  # so that small parameters stay whole, and others do not
        settings["zero_optimization"].setdefault("stage3_param_persistence_threshold", 30)
    optimizer = optimizer_of(groups_of(model))
    with pytest.MonkeyPatch.context() as patch:
        if setup.endswith("_fused"):
            patch.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=settings)
    return engine


def train_step(engine: Any, step: int = 0, poison: float = 1.0) -> float:
    """One forward, backward and step; the loss is multiplied by `poison`."""
    generator = torch.Generator().manual_seed(step + 100 * int(os.environ["RANK"]))
    tokens = torch.randint(0, 7, (4, 6), generator=generator).to(DEVICE)
    logits = engine(tokens)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()) * poison
    engine.backward(loss)
    engine.step()
    return loss.item()


def plant(engine: Any, name: str, index: tuple[int, ...], value: float = float("nan")) -> None:
    """Writes a value into a parameter or buffer, as a corrupted file would have."""
    tensor = {**dict(engine.module.named_parameters()), **dict(engine.module.named_buffers())}[name]
    with torch.no_grad():
        if tensor.numel() > 0:  # not so of one that stage 3 has partitioned
            tensor[index] = value
        if not hasattr(tensor, "ds_tensor"):
            return
        flat = 0
        for size, at in zip(tensor.ds_shape, index, strict=True):
            flat = flat * size + at
        rank, place = divmod(flat, tensor.partition_numel())
        if rank == int(os.environ["RANK"]):
            tensor.ds_tensor.view(-1)[place] = value


def skip_without_a_gpu_for_each(ranks: int) -> None:
    """Skips a test on GPUs if there are fewer of them: NCCL takes one rank a GPU."""
    if DEVICE.type == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")


def start_rank(script: Path, rank: int, ranks: int, port: int, **streams: Any) -> subprocess.Popen[str]:
    """Starts a script as one of several ranks, which can import the helpers of the tests."""
    environment = {
        **os.environ,
        **rank_environment(rank, ranks, port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [IMPORTABLE, os.environ.get("PYTHONPATH")])),
    }
    return subprocess.Popen([*fork_server.command(), str(script)], env=environment, text=True, **streams)


# The beginning of a script of `run_ranks` that makes engines.
HEAD = """
import logging, warnings
import torch
import deepspeed_support as support

support.allow_fp16()
import deepspeed
import hallo_numguard as ng

warnings.filterwarnings("ignore")
deepspeed.init_distributed("gloo")
logging.disable(logging.CRITICAL)
RANK = torch.distributed.get_rank()
WARN = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
"""


def run_ranks(
    script: str, folder: Path, ranks: int = 2, timeout: float = 200, contains_failures: bool = False
) -> list[str]:
    """Runs a script in several gloo processes; returns what each printed.

    Fails if one fails or hangs, or if the guard failed in one, unless `contains_failures`.
    """
    skip_without_a_gpu_for_each(ranks)
    path = folder / "script.py"
    # What hangs shows the stacks of every rank, and ends.
    watchdog = f"import faulthandler; faulthandler.dump_traceback_later({timeout - 10}, exit=True)"
    path.write_text(f"{watchdog}\nimport tells_failures\n{script}", encoding="utf-8")
    port = free_port()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [start_rank(path, rank, ranks, port, **streams) for rank in range(ranks)]
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
    all_of_them = "\n".join(f"rank {rank}:\n{output}" for rank, output in enumerate(outputs))
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, all_of_them
        assert contains_failures or tells_failures.PREFIX not in output, output
    return outputs


# setup, stage, offload, class of the optimizer
KINDS = [
    ("fp16", 0, False, "FP16_UnfusedOptimizer"),
    ("bf16", 0, False, "FP16_UnfusedOptimizer"),
    ("fp16_fused", 0, False, "FP16_Optimizer"),
    ("bf16_fused", 0, False, "FP16_Optimizer"),
    ("bf16_fp32", 1, False, "BF16_Optimizer"),
    ("fp16", 1, False, "DeepSpeedZeroOptimizer"),
    ("fp16", 2, False, "DeepSpeedZeroOptimizer"),
    ("half", 2, False, "DeepSpeedZeroOptimizer"),
    ("bf16", 2, False, "DeepSpeedZeroOptimizer"),
    ("bf16_fp32", 2, False, "DeepSpeedZeroOptimizer"),
    ("fp32", 2, False, "DeepSpeedZeroOptimizer"),
    ("fp16", 1, True, "DeepSpeedZeroOptimizer"),
    ("fp16", 2, True, "DeepSpeedZeroOptimizer"),
    ("bf16", 2, True, "DeepSpeedZeroOptimizer"),
    ("fp16", 3, False, "DeepSpeedZeroOptimizer_Stage3"),
    ("bf16", 3, False, "DeepSpeedZeroOptimizer_Stage3"),
    ("fp32", 3, False, "DeepSpeedZeroOptimizer_Stage3"),
    ("fp16", 3, True, "DeepSpeedZeroOptimizer_Stage3"),
    ("bf16", 3, True, "DeepSpeedZeroOptimizer_Stage3"),
]


def name_of(kind):
    setup, stage, offload, _ = kind
    return f"{setup}-stage{stage}{'-offload' if offload else ''}"


def weights(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        found[name] = (parameter.detach() if whole is None else whole).clone()
    return found


def plant_in_gradient(index, value=float("nan")):
    def hook(gradient):
        planted = gradient.clone()
        planted[index] = value
        return planted

    return hook


# Of a run that goes back to a checkpoint
STEPS = 10
SAVED = 3  # after this step; two clean steps later it is healthy
BAD = 7


def train_and_save(engine: Any, keeper: Any) -> dict[int, float]:
    """Trains on `STEPS` batches, and saves once; returns the losses by batch."""
    losses = {}
    for batch in range(1, STEPS + 1):
        losses[batch] = train_step(engine, batch)
        if batch == SAVED:
            keeper.save(engine)
    return losses


def check_rollback(folder: Path | str, options: dict[str, Any], lost: int, kind: str, where: str, **fault: Any) -> None:
    """Fails unless a damaged run goes back, and on as one that never saw the steps that were lost.

    Args:
        folder: Folder for checkpoints.
        options: Arguments of `make_engine`.
        lost: Step in which the damage of step `BAD` is found.
        kind, where, fault: Arguments of `ng.inject`.
    """
    import hallo_numguard as ng  # here, as bundles must be reproducible where it is not installed

    engine = make_engine(**options)
    keeper = ng.CheckpointKeeper(folder, healthy_after=2)
    guard = ng.attach(engine, ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback")))
    ng.inject(engine, kind, where, step=BAD, **fault)
    losses = train_and_save(engine, keeper)
    guard.detach()
    assert guard.last_report.step == lost
    assert guard.last_report.first.name == where
    assert [record.step for record in guard.history] == [*range(1, lost + 1), *range(4, 4 + STEPS - lost)]
    assert engine.global_steps == SAVED + STEPS - lost
    undamaged = make_engine(**options)
    for batch in [*range(1, SAVED + 1), *range(lost + 1, STEPS + 1)]:
        rounding = 0.0 if DEVICE.type == "cpu" else 1e-5  # GPUs add up the rows of an embedding in any order
        assert train_step(undamaged, batch) == pytest.approx(losses[batch], rel=rounding, abs=0.0), (options, batch)
