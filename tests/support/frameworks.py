"""One way to train under each framework's adapter, for the tests that hold for all of them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hallo_numguard as ng

import adapter_support as support
from campaign.faults import INPUT


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        guard: The guard, detached; None if the run was not guarded.
        raised: Whether the guard ended the run.
        scale: Loss scale in the end; None without a scaler.
        scheduled: Number of steps of the scheduler of the learning rate; None without one.
    """

    guard: Any
    raised: bool
    scale: float | None = None
    scheduled: int | None = None


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        bf16: Whether to autocast to bfloat16.
        accumulate: Number of micro-batches of a step.
        scale: Loss scale in the beginning. Default: no scaler.
        clip: Largest norm of the gradients; None for any.
        config: Configuration of the guard. Default: the campaign's.
        parallel: How several ranks train: "ddp" or "fsdp2".
        after_step: Called with the number of every step and what a keeper saves.
    """

    bf16: bool = False
    accumulate: int = 1
    scale: float | None = None
    clip: float | None = 1.0
    config: ng.GuardConfig | None = None
    parallel: str = ""
    after_step: Callable[[int, Any], None] = lambda *_: None

    def scaler(self) -> torch.amp.GradScaler | None:
        """Returns a scaler that does not grow."""
        return None if self.scale is None else torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=1000)


class Framework(ABC):
    """A framework without DeepSpeed.

    Attributes:
        models: Models of the campaign that it can train.
        prefix: What stands before the names of the model's parameters.
        scales: Whether it takes a GradScaler on a CPU.
    """

    models: tuple[str, ...] = ("transformer", "unet")
    prefix = ""
    scales = True

    def faulty(self, fault: str, name: str = "transformer", **how: Any) -> support.Faulty:
        """Returns a model with a fault planted, and its batches."""
        return support.Faulty(fault, name, **how)

    @abstractmethod
    def train(self, faulty: support.Faulty, folder: Path, guarded: bool = True, **options: Any) -> Outcome:
        """Trains for `faulty.steps` steps, as the framework's own documentation has it; see `Options`."""


class Accelerate(Framework):
    """A loop with an Accelerator."""

    def train(self, faulty, folder, guarded=True, **options):
        import accelerate

        how = Options(**options)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="bf16" if how.bf16 else "no", gradient_accumulation_steps=how.accumulate
        )
        if how.parallel == "fsdp2":  # Accelerate offers its plug-in on GPUs only
            accelerator.state.distributed_type = accelerate.utils.DistributedType.FSDP
            accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                cpu_ram_efficient_loading=False,
            )
        if how.scale is not None:
            accelerator.scaler = how.scaler()
        optimizer = faulty.optimizer()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        model, optimizer, scheduler = accelerator.prepare(faulty.model, optimizer, scheduler)
        guard = ng.attach(accelerator, how.config or faulty.config, faulty.reports.append) if guarded else None
        faulty.plant(optimizer)
        raised = False
        try:
            for step in range(how.accumulate, faulty.steps * how.accumulate + how.accumulate):
                with accelerator.accumulate(model):
                    arguments, target = faulty.batch(step // how.accumulate)
                    accelerator.backward(faulty.model.loss(model(*arguments), target))
                    if accelerator.sync_gradients and how.clip:
                        accelerator.clip_grad_norm_(model.parameters(), how.clip)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    how.after_step(step // how.accumulate, accelerator)
        except ng.NumericsError:
            raised = True
        if guard is not None:
            guard.detach()
        accelerator.free_memory()
        scale = None if how.scale is None else accelerator.scaler.get_scale()
        return Outcome(guard, raised, scale, scheduler.scheduler.last_epoch)


def hugging_face_trainer(faulty, folder, accumulate=1, callbacks=(), **settings):
    """Returns a Trainer that gets the campaign's batches, each of them one sample."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class PlantsWhenItBegins(TrainerCallback):
        """The Trainer makes the optimizer when it begins to train."""

        def on_train_begin(self, *_, optimizer, **__):
            faulty.plant(optimizer)

    def collate(samples):
        (number,) = samples
        (tokens, features), target = faulty.batch(number // accumulate + 1)
        return {"tokens": tokens, "features": features, "target": target}

    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "max_steps": faulty.steps,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    return Trainer(
        model=faulty.model,
        args=TrainingArguments(**{**usual, **settings}),
        train_dataset=list(range(faulty.steps * accumulate)),
        data_collator=collate,
        callbacks=[*callbacks, PlantsWhenItBegins()],
    )


class HuggingFace(Framework):
    """A Trainer with the callback."""

    models = ("transformer",)
    scales = False

    def faulty(self, fault, name="transformer", **how):
        return support.Faulty(fault, name, kind=support.WithLoss, **how)

    def train(self, faulty, folder, guarded=True, **options):
        how = Options(**options)
        callback = ng.integrations.NumGuardCallback(how.config or faulty.config, faulty.reports.append)
        settings = {"bf16": how.bf16, "max_grad_norm": how.clip or 0.0}
        trainer = hugging_face_trainer(faulty, folder, how.accumulate, [callback] * guarded, **settings)
        raised = False
        try:
            trainer.train()
        except ng.NumericsError as error:
            raised = error is callback.stopped_by
        return Outcome(callback if guarded else None, raised, scheduled=trainer.lr_scheduler.last_epoch)


class InBatch(support.Faulty):
    """Inputs are arguments of training_step."""

    def plant(self, optimizer, prefix=""):
        super().plant(optimizer, prefix)
        if self.fault == "input":
            self.planted = (f"batch[0][{self._position}]", INPUT[self.name][1])

    def batch(self, step):
        arguments, target = super().batch(step)
        if self.fault == "input" and step == 3 and self.rank == self.case.culprit:
            arguments[self._position][INPUT[self.name][1]] = float("nan")
        return arguments, target

    @property
    def _position(self):
        return 1 if self.name == "transformer" else 0


@functools.cache
def lightning_module(pl):
    """Returns a class of module that calls its model as most do: not through its own forward.

    Args:
        pl: The library, under its name of today or its older one.
    """

    class Module(pl.LightningModule):
        def __init__(self, faulty, accumulate=1, sharded=False):
            super().__init__()
            self.net, self.faulty, self.accumulate, self.sharded = faulty.model, faulty, accumulate, sharded

        def training_step(self, batch, batch_idx):
            arguments, target = batch
            loss = self.net.loss(self.net(*arguments), target)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = self.faulty.optimizer()
            self.faulty.plant(optimizer, "net.")
            return optimizer

        def configure_model(self):
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if self.sharded and not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def train_dataloader(self):
            steps = [step for step in range(1, self.faulty.steps + 1) for _ in range(self.accumulate)]
            return torch.utils.data.DataLoader(steps, collate_fn=lambda items: self.faulty.batch(items[0]))

    return Module


def lightning_trainer(pl: Any, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """Returns a Trainer that prints and keeps nothing."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(callbacks=list(callbacks), **{"accelerator": "cpu", "max_epochs": 1, **quiet, **settings})


class Lightning(Framework):
    """A Trainer with the callback."""

    prefix = "net."

    def faulty(self, fault, name="transformer", **how):
        return InBatch(fault, name, **how)

    def train(self, faulty, folder, guarded=True, module=None, callbacks=(), settings=None, **options):
        """Takes also the class of the module, more callbacks, and settings of the Trainer."""
        import lightning.pytorch as pl
        from lightning.pytorch.plugins import MixedPrecision

        how = Options(**options)
        scaler = how.scaler()

        class AfterStep(pl.Callback):
            steps = 0

            def on_train_batch_end(self, trainer, module, *_):
                self.steps += 1
                how.after_step(self.steps, {"module": module, "optimizer": trainer.optimizers[0]})

        sharded = how.parallel == "fsdp2"
        strategies = {"ddp": "ddp", "": "auto"}
        callback = ng.integrations.LightningNumGuardCallback(how.config or faulty.config, faulty.reports.append)
        usual = {
            "accumulate_grad_batches": how.accumulate,
            "gradient_clip_val": None if sharded else how.clip,
            "precision": "bf16-mixed" if how.bf16 else None,
            "plugins": [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)],
            "strategy": pl.strategies.ModelParallelStrategy(2, 1) if sharded else strategies[how.parallel],
            "devices": faulty.ranks,
            "use_distributed_sampler": False,
        }
        callbacks = [*[callback] * guarded, AfterStep(), *callbacks]
        trainer = lightning_trainer(pl, callbacks, **{**usual, **(settings or {})})
        raised = False
        try:
            trainer.fit((module or lightning_module(pl))(faulty, how.accumulate, sharded))
        except ng.NumericsError:
            raised = True
        return Outcome(callback if guarded else None, raised, None if scaler is None else scaler.get_scale())


FRAMEWORKS: dict[str, Framework] = {"accelerate": Accelerate(), "transformers": HuggingFace(), "lightning": Lightning()}
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
scaling_framework = pytest.mark.parametrize(
    "framework",
    [framework for framework in FRAMEWORKS.values() if framework.scales],
    ids=[name for name, framework in FRAMEWORKS.items() if framework.scales],
)
