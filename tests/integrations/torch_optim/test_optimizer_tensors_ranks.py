"""Two ranks with sparse gradients, frozen integers and loss weights outside of the model: DDP and fully_shard."""

from __future__ import annotations

import pytest

from deepspeed_support import run_ranks

COMMON = """
import logging, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import hallo_numguard as ng
from unusual_tensors import LowRank

logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")
dist.init_process_group("gloo")
RANK = dist.get_rank()
INTEGERS = "3 tensors are not checked, because they hold integers: base.codes, base.signed, base.mask"

def batch(step, bad=None):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + RANK))
    if step == bad and RANK == 1:
        x[1, 2] = float("nan")
    return x

class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8, sparse=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        tokens = torch.tensor([1, 5, 1, 9 + RANK])
        return self.out(self.table(tokens) + x)

def trained(model):
    return [p for p in model.parameters() if p.requires_grad]

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
"""


@pytest.mark.parametrize("when", ["on_alarm", "always"])
def test_sparse_gradients_under_distributed_data_parallel(tmp_path, when):
    run_ranks(
        COMMON
        + f"""
runs = []
for guarded in (False, True):
    torch.manual_seed(0)
    model = DistributedDataParallel(Recommender())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if guarded:
        optimizer = ng.GuardedOptimizer(optimizer, model, ng.GuardConfig(local_gradients={when!r}))
    for step in range(1, 7):
        if step == 4 and not guarded:
            continue
        optimizer.zero_grad()
        model(batch(step, 4)).square().mean().backward()
        assert model.module.table.weight.grad.is_sparse
        optimizer.step()
    runs.append([p.detach() for p in model.parameters()])
assert all(torch.equal(one, other) for one, other in zip(*runs))
report = optimizer.last_report
assert (report.verdict, report.first.name, report.first.index, report.first.rank) == (
    "input_nonfinite", "x", (1, 2), 1), report
assert optimizer.findings == []
"""
        + "\ndist.destroy_process_group()\n",
        tmp_path,
    )


def test_frozen_integers_and_loss_weights_under_fully_shard(tmp_path):
    run_ranks(
        COMMON
        + """
runs = []
for guarded in (False, True):
    torch.manual_seed(0)
    model, weights = LowRank(), nn.Parameter(torch.zeros(2))
    fully_shard(model)
    optimizer = torch.optim.AdamW([{"params": trained(model)}, {"params": [weights]}])
    if guarded:
        optimizer = ng.GuardedOptimizer(optimizer, model)
    for step in range(1, 7):
        if step == 4 and not guarded:
            continue
        optimizer.zero_grad()
        (model(batch(step, 4)).square().mean() + weights.square().sum() + weights.sum()).backward()
        optimizer.step()
    runs.append([*(local(p).detach() for p in model.parameters()), weights.detach()])
assert all(torch.equal(one, other) for one, other in zip(*runs))
report = optimizer.last_report
assert (report.verdict, report.step) == ("input_nonfinite", 4), report
assert [finding.message for finding in optimizer.findings] == [INTEGERS], optimizer.findings
last = optimizer.history[-1].parameters
assert ("param_groups[1][0]" in last) == (RANK == 0)
"""
        + "\ndist.destroy_process_group()\n",
        tmp_path,
    )
