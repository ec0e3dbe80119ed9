"""Gradients in float16 that are added up over ranks before they are divided, as in horovod/horovod #1699."""

import sys

import torch
from torch import nn

import hallo_numguard as ng


def add_up(_, bucket):
    """Sums in float16, then divides."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0] / torch.distributed.get_world_size())


torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Linear(4, 2, bias=False).half()
model = nn.parallel.DistributedDataParallel(net)
model.register_comm_hook(None, add_up)
reports = []
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-9), model, on_overflow=reports.append)
(model(torch.full((1, 4), 10.0).half()) * 4000).sum().backward()
optimizer.step()
if reports and torch.distributed.get_rank() == 0:
    sys.stdout.write(f"REPORT {reports[-1]}\n")
torch.distributed.destroy_process_group()
