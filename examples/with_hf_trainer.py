"""The Hugging Face Trainer: `trainer.add_callback(ng.integrations.NumGuardCallback())`."""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hallo_numguard as ng

torch.manual_seed(0)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    max_steps=5,
    logging_steps=1,
    logging_nan_inf_filter=False,  # else the Trainer's log hides losses that are NaN
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
callback = ng.integrations.NumGuardCallback()
trainer.add_callback(callback)
ng.inject(trainer, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see
try:
    trainer.train()
except ng.NumericsError as error:  # uncaught, it ends the script as a failed one
    print(error.report)
