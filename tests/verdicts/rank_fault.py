"""One GPU of many that makes NaN where its peers do not, until it is reset, as told in pytorch/torchtitan #951."""

import sys

import torch
from torch import nn

import hallo_numguard as ng

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
model = nn.parallel.DistributedDataParallel(net)
reports = []
config = ng.GuardConfig(local_gradients="always")  # so that it is known which rank was bad
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = ng.GuardedOptimizer(sgd, model, config, on_overflow=reports.append)
if rank == 1:
    ng.inject(optimizer, "gradient", "2.weight", index=(1, 5))
model(torch.randn(4, 4)).square().mean().backward()
optimizer.step()
if reports and rank == 0:
    sys.stdout.write(f"REPORT {reports[-1]}\n")
torch.distributed.destroy_process_group()
