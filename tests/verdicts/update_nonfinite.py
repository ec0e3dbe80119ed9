"""Adam on weights in float16, where its default eps is 0, as in pytorch/pytorch #8860."""

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).half()
optimizer = ng.GuardedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), model)
try:
    (1e-2 * model(torch.randn(16, 4).half()).square().mean()).backward()
    optimizer.step()
except ng.NumericsError as error:
    report = error.report
