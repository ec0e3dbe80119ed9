"""Ways to train with a cause planted, as their documentation has it.

In plain loops, DDP, FSDP2 and DeepSpeed the parameters are of the precision themselves; the other frameworks autocast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hallo_numguard as ng

from causes.cases import STEPS
from causes.planted import Batch, Run


def plain(run: Run, wrap: Callable[[nn.Module], nn.Module] = lambda model: model, has_step: bool = False) -> None:
    """A loop with a GuardedOptimizer."""
    run.model.to(run.dtype)
    run.compile()
    model = wrap(run.model)
    optimizer = ng.GuardedOptimizer(run.optimizer(), model, run.config, run.reports.append)
    run.guards = [optimizer]

    def step_of(batch: Batch) -> torch.Tensor:
        return run.loss(model, batch)

    step_function = optimizer.wrap_step(step_of) if has_step else step_of
    for step in range(1, STEPS + 1):
        run.before(step, optimizer)
        optimizer.zero_grad()
        for batch in run.micro_batches(step):
            step_function(batch).backward()
        optimizer.step()
    run.end()


def wrapped(run: Run) -> None:
    """The same, and the guard knows the function that makes the loss."""
    plain(run, has_step=True)


def data_parallel(run: Run) -> None:
    """DistributedDataParallel."""
    plain(run, nn.parallel.DistributedDataParallel)


def fully_sharded(run: Run) -> None:
    """FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plain(run, lambda model: fully_shard(model, mesh=mesh))


def _new_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _autocast(run: Run, accelerator: Any) -> None:
    """Lets an Accelerator train in float16, which it offers on GPUs only."""
    if run.case.dtype == "fp16":
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = run.scaler()


def accelerate(run: Run) -> None:
    """A loop with an Accelerator."""
    from accelerate import Accelerator

    _new_accelerate()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if run.case.dtype == "bf16" else "no")
    _autocast(run, accelerator)
    run.compile()
    model, optimizer = accelerator.prepare(run.model, run.optimizer())
    run.guards = [ng.attach(accelerator, run.config, run.reports.append)]
    for step in range(1, STEPS + 1):
        run.before(step, optimizer)
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = run.loss(model, run.batch(step))
        accelerator.backward(loss)
        optimizer.step()
    run.end()
    accelerator.free_memory()


def trainer(run: Run) -> None:
    """A Trainer of transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    _new_accelerate()

    class Plants(TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            run.before(state.global_step + 1, optimizer)

    class Trains(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            return run.loss(model, inputs)

    optimizer = run.optimizer()
    run.compile()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            bf16=run.case.dtype == "bf16",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        made = Trains(
            model=run.model,
            args=arguments,
            train_dataset=list(range(1, STEPS + 1)),
            data_collator=lambda numbers: run.batch(numbers[0]),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[Plants()],
        )
        _autocast(run, made.accelerator)
        run.guards = [ng.attach(made, run.config, run.reports.append)]
        made.train()
    run.end()


def lightning(run: Run) -> None:
    """A Trainer of Lightning."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return run.loss(self.net, batch)

        def configure_optimizers(self) -> Any:
            return run.optimizer()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            run.before(batch_idx + 1, self.trainer.optimizers[0])

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(range(1, STEPS + 1), collate_fn=lambda items: run.batch(items[0]))

    run.compile()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed" if run.case.dtype == "bf16" else None,
        plugins=[MixedPrecision("16-mixed", "cpu", run.scaler())] if run.case.dtype == "fp16" else [],
        **quiet,
    )
    run.guards = [ng.attach(made, run.config, run.reports.append)]
    made.fit(Module())
    run.end()


def deepspeed(stage: int) -> Callable[[Run], None]:
    """Returns DeepSpeed with a stage of ZeRO."""

    def train(run: Run) -> None:
        import deepspeed_support

        run.model.to(run.dtype)  # buffers too
        engine = deepspeed_support.make_engine(run.case.dtype, 4, stage, model=run.model)
        if run.backend is not None:
            engine.compile(backend=run.backend)
        run.guards = [ng.attach(engine, run.config, run.reports.append)]
        for step in range(1, STEPS + 1):
            run.before(step, engine.optimizer)
            engine.backward(run.loss(engine, run.batch(step)))
            engine.step()
        run.end()
        engine.destroy()

    return train


WAYS: dict[str, Callable[[Run], None]] = {
    "plain": plain,
    "wrap_step": wrapped,
    "Accelerate": accelerate,
    "Trainer": trainer,
    "Lightning": lightning,
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
    **{f"DeepSpeed {stage}": deepspeed(stage) for stage in range(4)},
}
