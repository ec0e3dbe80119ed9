"""One way to train under each framework's adapter, for the tests that hold for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hallo_numguard as ng

import adapter_support as support


class Outcome(NamedTuple):
    """What came of a run.

    Attributes:
        guard: The guard, detached; None if the run was not guarded.
        raised: Whether the guard ended the run.
        scale: Loss scale in the end; None without a scaler.
    """

    guard: Any
    raised: bool
    scale: float | None = None


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

    def faulty(self, fault: str, name: str = "transformer") -> support.Faulty:
        """Returns a model with a fault planted, and its batches."""
        return support.Faulty(fault, name)

    @abstractmethod
    def train(
        self,
        faulty: support.Faulty,
        folder: Path,
        guarded: bool = True,
        bf16: bool = False,
        accumulate: int = 1,
        scale: float | None = None,
        clip: float | None = 1.0,
        config: ng.GuardConfig | None = None,
    ) -> Outcome:
        """Trains for `faulty.steps` steps, as the framework's own documentation has it."""


class Accelerate(Framework):
    """A loop with an Accelerator."""

    def train(self, faulty, folder, guarded=True, bf16=False, accumulate=1, scale=None, clip=1.0, config=None):
        import accelerate

        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=accumulate
        )
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        trained = [parameter for parameter in faulty.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        model, optimizer = accelerator.prepare(faulty.model, optimizer)
        guard = ng.attach(accelerator, config or faulty.config, faulty.reports.append) if guarded else None
        faulty.plant(optimizer)
        raised = False
        try:
            for step in range(accumulate, faulty.steps * accumulate + accumulate):
                with accelerator.accumulate(model):
                    arguments, target = faulty.batch(step // accumulate)
                    accelerator.backward(faulty.model.loss(model(*arguments), target))
                    if accelerator.sync_gradients and clip:
                        accelerator.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
        except ng.NumericsError:
            raised = True
        if guard is not None:
            guard.detach()
        return Outcome(guard, raised, None if scale is None else accelerator.scaler.get_scale())


class HuggingFace(Framework):
    """A Trainer with the callback."""

    models = ("transformer",)
    scales = False

    def faulty(self, fault, name="transformer"):
        return support.Faulty(fault, name, kind=support.WithLoss)

    def train(self, faulty, folder, guarded=True, bf16=False, accumulate=1, scale=None, clip=1.0, config=None):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class PlantsWhenItBegins(TrainerCallback):
            """The Trainer makes the optimizer when it begins to train."""

            def on_train_begin(self, *_, optimizer, **__):
                faulty.plant(optimizer)

        def collate(samples):
            (number,) = samples
            (tokens, features), target = faulty.batch(number // accumulate + 1)
            return {"tokens": tokens, "features": features, "target": target}

        settings = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_steps=faulty.steps,
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            remove_unused_columns=False,
            disable_tqdm=True,
            max_grad_norm=clip or 0.0,
        )
        samples = list(range(faulty.steps * accumulate))
        trainer = Trainer(model=faulty.model, args=settings, train_dataset=samples, data_collator=collate)
        callback = ng.integrations.NumGuardCallback(config or faulty.config, faulty.reports.append)
        if guarded:
            trainer.add_callback(callback)
        trainer.add_callback(PlantsWhenItBegins())
        trainer.train()
        return Outcome(callback if guarded else None, callback.stopped_by is not None)


class _InBatch(support.Faulty):
    """Inputs are arguments of training_step."""

    def plant(self, optimizer, prefix=""):
        super().plant(optimizer, prefix)
        if self.fault == "input":
            self.planted = (f"batch[0][{self._position}]", support.INPUT[self.name][1])

    def batch(self, step):
        arguments, target = super().batch(step)
        if self.fault == "input" and step == 3:
            arguments[self._position][support.INPUT[self.name][1]] = float("nan")
        return arguments, target

    @property
    def _position(self):
        return 1 if self.name == "transformer" else 0


class Lightning(Framework):
    """A Trainer with the callback, and a module that calls its model as most do: not through its own forward."""

    prefix = "net."

    def faulty(self, fault, name="transformer"):
        return _InBatch(fault, name)

    def train(self, faulty, folder, guarded=True, bf16=False, accumulate=1, scale=None, clip=1.0, config=None):
        import lightning.pytorch as pl
        from lightning.pytorch.plugins import MixedPrecision

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = faulty.model

            def training_step(self, batch, batch_idx):
                arguments, target = batch
                return self.net.loss(self.net(*arguments), target)

            def configure_optimizers(self):
                optimizer = torch.optim.AdamW([item for item in self.parameters() if item.requires_grad], lr=1e-3)
                faulty.plant(optimizer, "net.")
                return optimizer

            def train_dataloader(self):
                steps = [step for step in range(1, faulty.steps + 1) for _ in range(accumulate)]
                return torch.utils.data.DataLoader(steps, collate_fn=lambda items: faulty.batch(items[0]))

        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        callback = ng.integrations.LightningNumGuardCallback(config or faulty.config, faulty.reports.append)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            precision="bf16-mixed" if bf16 else None,
            plugins=[] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)],
            callbacks=[callback] * guarded,
            **quiet,
        )
        raised = False
        try:
            trainer.fit(Module())
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
