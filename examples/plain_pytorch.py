"""Plain PyTorch: `optimizer = ng.GuardedOptimizer(optimizer, model)`."""

from __future__ import annotations

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = ng.GuardedOptimizer(plain, model, clip_norm=1.0)  # clips by the norm that it has at hand
ng.inject(model, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see

try:
    for _ in range(5):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
except ng.NumericsError as error:
    print(error)
