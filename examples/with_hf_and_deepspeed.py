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

torch.manual_seed(0)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    deepspeed={"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}},
    optim="adamw_torch",
    per_device_train_batch_size=4,
    max_steps=5,
    logging_steps=1,
    save_strategy="no",
    remove_unused_columns=False,
    report_to=[],
)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
data = [{"input": torch.randn(8), "labels": torch.randn(1)} for _ in range(32)]
trainer = Trainer(
    model,
    arguments,
    train_dataset=data,
    compute_loss_func=lambda output, labels, **_: (output - labels).square().mean(),
)
guard = ng.attach(trainer)
ng.inject(trainer, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see
try:
    trainer.train()
except ng.NumericsError as error:  # uncaught, it ends the script as a failed one
    print(error.report)
