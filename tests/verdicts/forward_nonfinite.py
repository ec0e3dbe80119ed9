"""A batch norm written by hand, and a last batch of one sample, as in karpathy/makemore #22."""

import warnings

import torch
from torch import nn

import hallo_numguard as ng


class BatchNorm(nn.Module):
    """Without running statistics."""

    def forward(self, x):
        variance = x.var(0)
        return (x - x.mean(0)) / (variance + 1e-5).sqrt()


warnings.simplefilter("ignore")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), BatchNorm(), nn.Tanh(), nn.Linear(8, 3))
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
for batch in torch.randn(9, 4).split(4):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
report = optimizer.last_report
