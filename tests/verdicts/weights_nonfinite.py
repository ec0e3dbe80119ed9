"""A downloaded file whose last convolution is NaN in places, as in cardwing/Codes-for-PVKD #9."""

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
loaded = model.state_dict()
loaded["2.weight"][1:3] = float("nan")
model.load_state_dict(loaded)

optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
try:
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
except ng.NumericsError as error:
    report = error.report
