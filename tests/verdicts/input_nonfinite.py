"""A silent recording, which the data set divides by its loudness, as in yxlu-0102/MP-SENet #33."""

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
sound = torch.randn(4, 32)
sound[2] = 0
noisy = sound * (32 / sound.square().sum(1, keepdim=True)).sqrt()
(model(noisy) - sound).abs().mean().backward()
optimizer.step()
report = optimizer.last_report
