"""Ways to train a family: a framework and a precision, as their documentation has it."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import hallo_numguard as ng

from healthy.families import Batch, Family

FIRST_SCALE_POWER = 24  # far too high: it must come down first
GROWTH_INTERVAL = 100  # and then it goes up again, until it is too high again
CLIP = 1.0
# Small, so that every model has several; some parameters of stage 3 stay whole.
_BUCKETS = {
    "reduce_bucket_size": 10_000,
    "allgather_bucket_size": 20_000,
    "stage3_param_persistence_threshold": 100,
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Run:
    """One run of one rank: what a way needs, and what it leaves behind.

    Args:
        family: What is trained.
        dtype: "fp32", "bf16" or "fp16".
        steps: Number of steps.
        guarded: Whether to guard.
        rank: This process.

    Attributes:
        model: The model, as the family has built it.
        guards: Guards, detached in the end.
        reports: What they have reported.
        tensors: More tensors that the run must end with: masters, moments.
    """

    def __init__(self, family: Family, dtype: str, steps: int, guarded: bool, rank: int) -> None:
        self.family, self.dtype, self.steps, self.guarded, self.rank = family, dtype, steps, guarded, rank
        self.config = ng.GuardConfig(history=steps)
        seed(0)
        self.model = family.build().train()
        self.guards: list[Any] = []
        self.reports: list[ng.OverflowReport] = []
        self.tensors: Callable[[], list[torch.Tensor]] = list

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, from 1."""
        return self.family.batch(torch.Generator().manual_seed(step + 100_000 * self.rank))

    def begin(self) -> None:
        """Sets the generators, of each rank to something else."""
        seed(1 + self.rank)

    def end(self) -> None:
        """Removes the guards."""
        for guard in self.guards:
            guard.detach()

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns autocast to the precision."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float16)

    def scaler(self) -> torch.amp.GradScaler:
        """Returns a scaler, which does nothing but in float16."""
        options = {"init_scale": 2.0**FIRST_SCALE_POWER, "growth_interval": GROWTH_INTERVAL}
        return torch.amp.GradScaler("cpu", **options, enabled=self.dtype == "fp16")

    def take(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Lets the run end with the state of these optimizers."""

        def moments() -> list[torch.Tensor]:
            states = (state for optimizer in optimizers for state in optimizer.state.values())
            return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

        self.tensors = moments


def seed(number: int) -> None:
    """Sets all global generators."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def plain(run: Run, wrap: Callable[[nn.Module], nn.Module] = lambda part: part, clips: bool = False) -> None:
    """A loop with a GuardedOptimizer."""
    family = run.family
    parts = family.parts(run.model)
    called = [wrap(part) for part in parts]
    whole = called[0] if len(called) == 1 else None
    optimizers: list[Any] = family.optimizers(run.model)
    run.take(optimizers)
    if run.guarded:
        of = [whole] * len(optimizers) if whole is not None else called
        pairs = zip(optimizers, of, strict=True)
        optimizers = [
            ng.GuardedOptimizer(optimizer, model, run.config, run.reports.append) for optimizer, model in pairs
        ]
        run.guards = optimizers
    scaler = run.scaler()
    run.begin()
    for step in range(1, run.steps + 1):
        batch = run.batch(step)
        for name, stepped in zip(family.losses, family.stepped, strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with run.cast():
                loss = getattr(family, name)(batch, *called)
            scaler.scale(loss).backward()
            for at in stepped:
                if clips and family.clipped:
                    scaler.unscale_(optimizers[at])
                    parameters = [p for group in optimizers[at].param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(parameters, CLIP)
                scaler.step(optimizers[at])
        scaler.update()
    run.end()


def data_parallel(run: Run) -> None:
    """DistributedDataParallel, with torch's own clipping."""

    def wrap(part: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(part, find_unused_parameters=run.family.unused)

    plain(run, wrap, clips=True)


def fully_sharded(run: Run) -> None:
    """FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    run.model.to(memory_format=torch.contiguous_format)  # the only one that it shards
    plain(run, lambda part: fully_shard(part, mesh=mesh))


def accelerate(run: Run) -> None:
    """A loop with an Accelerator."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if run.dtype == "bf16" else "no")
    _allow_fp16(run, accelerator)
    family = run.family
    optimizers = family.optimizers(run.model)
    run.take(optimizers)
    parts = family.parts(run.model)
    prepared = accelerator.prepare(*parts, *optimizers)
    prepared = [prepared] if not isinstance(prepared, tuple) else prepared
    called, steppers = prepared[: len(parts)], prepared[len(parts) :]
    run.guards = [ng.attach(accelerator, run.config, run.reports.append)] if run.guarded else []
    run.begin()
    for step in range(1, run.steps + 1):
        batch = run.batch(step)
        for name, stepped in zip(family.losses, family.stepped, strict=True):
            for stepper in steppers:
                stepper.zero_grad()
            with accelerator.autocast():
                loss = getattr(family, name)(batch, *called)
            accelerator.backward(loss)
            if family.clipped:
                accelerator.clip_grad_norm_(run.model.parameters(), CLIP)
            for at in stepped:
                steppers[at].step()
    run.end()
    accelerator.free_memory()


def _allow_fp16(run: Run, accelerator: Any) -> None:
    """Lets an Accelerator train in float16, which it offers on GPUs only."""
    if run.dtype == "fp16":
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = run.scaler()


def trainer(run: Run) -> None:
    """A Trainer of transformers."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()

    class Begins(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            run.begin()

    class Trains(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            return run.family.loss(inputs, model)

    folder = tempfile.TemporaryDirectory()  # for reports
    (optimizer,) = run.family.optimizers(run.model)
    run.take([optimizer])
    settings = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 50}
    arguments = TrainingArguments(
        output_dir=folder.name,
        per_device_train_batch_size=1,
        max_steps=run.steps,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        bf16=run.dtype == "bf16",
        max_grad_norm=CLIP if run.family.clipped else 0.0,
        **settings,
    )
    made = Trains(
        model=run.model,
        args=arguments,
        train_dataset=list(range(1, run.steps + 1)),
        data_collator=lambda numbers: run.batch(numbers[0]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * run.steps))),
        callbacks=[Begins()],
    )
    _allow_fp16(run, made.accelerator)
    run.guards = [ng.attach(made, run.config, run.reports.append)] if run.guarded else []
    made.train()
    run.end()
    folder.cleanup()


def lightning(run: Run) -> None:
    """A Trainer of Lightning."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            loss = run.family.loss(batch, self.net)
            self.log("loss", loss, batch_size=1)
            return loss

        def configure_optimizers(self) -> Any:
            (optimizer,) = run.family.optimizers(run.model)
            run.take([optimizer])
            return optimizer

        def on_train_start(self) -> None:
            run.begin()

        def train_dataloader(self) -> Any:
            numbers = list(range(1, run.steps + 1))
            return torch.utils.data.DataLoader(numbers, collate_fn=lambda items: run.batch(items[0]))

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=CLIP if run.family.clipped else None,
        precision="bf16-mixed" if run.dtype == "bf16" else None,
        plugins=[MixedPrecision("16-mixed", "cpu", run.scaler())] if run.dtype == "fp16" else [],
        **quiet,
    )
    run.guards = [ng.attach(made, run.config, run.reports.append)] if run.guarded else []
    made.fit(Module())
    run.end()


def zero(stage: int) -> Callable[[Run], None]:
    """Returns DeepSpeed's ZeRO of a stage, whose parameters are of the precision themselves."""

    def train(run: Run) -> None:
        import deepspeed_support

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(run.dtype, torch.float32)
        run.model.to(dtype, memory_format=torch.contiguous_format)  # buffers too; it flattens no other format
        engine = deepspeed_support.make_engine(
            run.dtype,
            FIRST_SCALE_POWER,
            stage,
            model=run.model,
            groups_of=run.family.groups,
            zero_optimization={"stage": stage, **_BUCKETS},
            gradient_clipping=0.0,  # else the guard's norm is used, which is the more accurate
        )
        run.guards = [ng.attach(engine, run.config, run.reports.append)] if run.guarded else []
        run.begin()
        for step in range(1, run.steps + 1):
            loss = run.family.loss(_in(run.batch(step), dtype), engine)
            engine.backward(loss)
            engine.step()
        run.end()
        ends = _whole_state(engine)
        run.tensors = lambda: ends
        engine.destroy()

    return train


def _in(value: Any, dtype: torch.dtype) -> Any:
    """The same, with its real numbers in a precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in(item, dtype) for name, item in value.items()}
    return [_in(item, dtype) for item in value]


def _whole_state(engine: Any) -> list[torch.Tensor]:
    """Masters and moments, put together from all ranks: what pads their slices is of no account."""
    from deepspeed.utils import safe_get_full_optimizer_state

    import deepspeed_support

    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    moments = [safe_get_full_optimizer_state(parameter, name) for parameter in trained for name in _MOMENTS]
    return [*deepspeed_support.weights(engine).values(), *(moment.clone() for moment in moments if moment is not None)]


# name: world, how
WAYS: dict[str, tuple[int, Callable[[Run], None]]] = {
    "plain": (1, plain),
    "DDP": (2, data_parallel),
    "FSDP2": (2, fully_sharded),
    "Accelerate": (1, accelerate),
    "Trainer": (1, trainer),
    "Lightning": (1, lightning),
    "ZeRO-1": (2, zero(1)),
    "ZeRO-2": (2, zero(2)),
    "ZeRO-3": (2, zero(3)),
}
