"""A run that was resumed with NaN in a moment of Adam: the loss is NaN from then on, as in NVIDIA-NeMo/RL #3544."""

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
try:
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        if step == 1:
            saved = optimizer.state_dict()
            saved["state"][0]["exp_avg_sq"][3, 2] = float("nan")
            optimizer.load_state_dict(saved)
except ng.NumericsError as error:
    report = error.report
