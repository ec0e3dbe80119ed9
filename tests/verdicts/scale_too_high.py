"""The first step of a run in float16, whose loss scale begins high and falls, as in huggingface/transformers #14531."""

import torch
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
nn.init.constant_(model[2].weight, 25.0)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
with torch.autocast("cpu", torch.float16):
    output = model(torch.randn(4, 8))
scaler.scale(output.float().mean()).backward()
scaler.step(optimizer)
report = optimizer.last_report
