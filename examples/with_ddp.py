"""DistributedDataParallel: give the guard the wrapped model. `torchrun --nproc-per-node 2 examples/with_ddp.py`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hallo_numguard as ng

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, clip_norm=1.0)
ng.inject(model, "parameter", "0.weight", index=(3, 5), step=3, rank=1)  # the fault, on one rank only

try:
    for _ in range(5):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
except ng.NumericsError as error:  # on both
    if rank == 0:
        print(error)
torch.distributed.destroy_process_group()
