"""A loss of depth that is NaN, and whose code has not been watched yet, as in vinvino02/GLPDepth #30."""

import torch
from torch import nn

import hallo_numguard as ng


def silog(depth, truth):
    difference = depth.log() - truth.log()
    return (difference.square().mean() - 0.5 * difference.mean().square()).sqrt()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
silog(model(torch.randn(8, 4)), torch.rand(8, 6) + 0.5).backward()
optimizer.step()
report = optimizer.last_report
