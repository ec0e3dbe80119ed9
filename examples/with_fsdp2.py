"""FSDP2: shard first, then guard. `torchrun --nproc-per-node 2 examples/with_fsdp2.py`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hallo_numguard as ng

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.distributed.init_process_group()
rank = torch.distributed.get_rank()
mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
fully_shard(model, mesh=mesh)
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, clip_norm=1.0)

try:
    for step in range(1, 6):
        batch = torch.randn(4, 8, device=device)
        if step == 3 and rank == 1:
            batch[2, 5] = float("nan")  # the fault, so that there is something to see
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
finally:
    if rank == 0:
        print(optimizer.last_report)
    torch.distributed.destroy_process_group()
