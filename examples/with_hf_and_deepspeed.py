"""The Hugging Face Trainer on DeepSpeed: `guard = ng.attach(trainer)`, before `train()`."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hallo_numguard as ng

for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29545}.items():
    os.environ.setdefault(name, str(value))
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


class Regression(nn.Module):
    """What the Trainer asks for: a forward that returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a batch, [n, 8] and [n]."""
        predicted = self.second(torch.tanh(self.first(x))).squeeze(-1)
        return {"loss": (predicted - labels).square().mean()}


torch.manual_seed(0)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}},
    optim="adamw_torch",
    per_device_train_batch_size=4,
    max_steps=5,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
data = [{"x": torch.randn(8), "labels": torch.randn(())} for _ in range(32)]
trainer = Trainer(model=Regression(), args=arguments, train_dataset=data)
guard = ng.attach(trainer)
ng.inject(trainer, "parameter", "first.weight", index=(3, 5), step=3)  # the fault, so that there is something to see
trainer.train()  # returns: the guard has stopped it
print(guard.last_report)
