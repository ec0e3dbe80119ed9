"""torch.amp.GradScaler: the loop stays as it is; what the scaler skips in silence becomes a report."""

from __future__ import annotations

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
scaler = torch.amp.GradScaler(device)
ng.inject(model, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see

try:
    for _ in range(5):
        with torch.autocast(device, dtype=torch.float16):
            loss = model(torch.randn(4, 8, device=device)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
except ng.NumericsError as error:
    print(error)
