"""Trackers: `GuardConfig(sinks=[writer, "wandb", "mlflow", "csv:figures.csv"])`, each a run that is active already."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import hallo_numguard as ng

folder = Path(tempfile.mkdtemp())
writer = SummaryWriter(str(folder))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
config = ng.GuardConfig(sinks=[writer, f"csv:{folder / 'figures.csv'}"])
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, config)
ng.inject(model, "activation", "1", step=3)  # the fault, so that there is something to see

for _ in range(5):
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.detach()
writer.close()
print((folder / "figures.csv").read_text())
