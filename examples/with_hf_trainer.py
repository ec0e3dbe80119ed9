"""The Hugging Face Trainer: `trainer.add_callback(ng.integrations.NumGuardCallback())`."""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hallo_numguard as ng


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
    per_device_train_batch_size=4,
    max_steps=5,
    logging_steps=1,
    logging_nan_inf_filter=False,  # else the Trainer's log hides losses that are NaN
    save_strategy="no",
    report_to=[],
)
data = [{"x": torch.randn(8), "labels": torch.randn(())} for _ in range(32)]
trainer = Trainer(model=Regression(), args=arguments, train_dataset=data)
callback = ng.integrations.NumGuardCallback()
trainer.add_callback(callback)
ng.inject(trainer, "parameter", "first.weight", index=(3, 5), step=3)  # the fault, so that there is something to see
trainer.train()  # returns: the guard has stopped it
print(callback.last_report)
