"""Ranks that do not all do the same under DistributedDataParallel: nothing hangs, healthy runs keep their bits."""

from __future__ import annotations

import pytest

from deepspeed_support import run_ranks

HEAD = """
import datetime, logging, warnings
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import hallo_numguard as ng
from hallo_numguard.tracing.rerun import is_rerunning

logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
RANK = dist.get_rank()
WARN = ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.last(self.hidden(x)).square().mean()

    def hidden(self, x):
        return torch.tanh(self.first(x))

def batch(step, bad=False):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step * 10 + RANK))
    if bad:
        x[0, 0] = float("nan")
    return x

def make(kind=Model, guard=True, on_overflow=None, **config):
    torch.manual_seed(0)
    model = DistributedDataParallel(kind())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if guard:
        optimizer = ng.GuardedOptimizer(optimizer, model, ng.GuardConfig(policy=WARN, **config), on_overflow)
    return model, optimizer

def train(model, optimizer, steps, bad=lambda step: False):
    for step in steps:
        model(batch(step, bad(step))).backward()
        optimizer.step()
        optimizer.zero_grad()

def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

def ranks_are_equal(model):
    mine = weights(model)
    other = mine.clone()
    dist.broadcast(other, 0)
    return torch.equal(mine, other) and bool(mine.isfinite().all())
"""

TAIL = """
dist.barrier()
dist.destroy_process_group()
print("done")
"""

LOCAL_STEPS = """
def run(guard, bad_step):
    model, optimizer = make(guard=guard)
    train(model, optimizer, range(2))
    for step in range(2, 6):
        with model.no_sync():
            model(batch(step, step == bad_step and RANK == 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.last_report if guard else None
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= 2
    train(model, optimizer, range(6, 8))
    return weights(model), report, ranks_are_equal(model)

plain, _, _ = run(False, None)
clean, report, _ = run(True, None)
assert report is None and torch.equal(plain, clean)
_, report, equal = run(True, 4)
assert equal
if RANK == 1:
    assert (report.step, report.verdict, report.first.rank) == (5, "input_nonfinite", 1), report
    assert any("no_sync" in line for line in report.evidence), report
else:
    assert report is None
"""

ACCUMULATION = """
def run(guard, bad):
    model, optimizer = make(guard=guard)
    for step in range(6):
        with model.no_sync():
            model(batch(step)).backward()
        model(batch(step + 100, bad and step == 3 and RANK == 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), optimizer

plain, _ = run(False, False)
clean, _ = run(True, False)
assert torch.equal(plain, clean)
_, optimizer = run(True, True)
report = optimizer.last_report
assert (report.verdict, report.first.rank, report.world_size) == ("input_nonfinite", 1, 2), report
"""

UNEVEN = """
def run(guard, bad_step):
    model, optimizer = make(guard=guard)
    with model.join():
        train(model, optimizer, range(6 if RANK == 0 else 2), lambda step: step == bad_step and RANK == 0)
    return model, optimizer

(plain, _), (clean, optimizer) = run(False, None), run(True, None)
assert torch.equal(weights(plain), weights(clean)) and optimizer.last_report is None
model, optimizer = run(True, 4)
assert bool(weights(model).isfinite().all())
assert (optimizer.last_report is None) == (RANK == 1)
if RANK == 0:
    assert any("join" in line for line in optimizer.last_report.evidence)
"""

OWN_COLLECTIVES = """
class Shared(Model):
    def forward(self, x):
        hidden = self.hidden(x)
        hidden = hidden + differentiable.all_reduce(hidden.clone()) / 2
        if is_rerunning() and RANK == 1 and self.fails:
            raise torch.OutOfMemoryError("planted")
        hidden = hidden + 0 * differentiable.all_reduce(hidden.clone())
        return self.last(hidden).square().mean() + (self.last.weight * 0).norm() ** (0.5 if self.bad else 1.0)

for fails in (False, True):
    for bad_rank in (0, 1):
        model, optimizer = make(Shared)
        model.module.fails, model.module.bad = fails, False
        train(model, optimizer, range(2))
        model.module.bad = RANK == bad_rank
        train(model, optimizer, [2])
        model.module.bad = False
        train(model, optimizer, [3])
        report = optimizer.last_report
        assert report.step == 3 and report.world_size == 2
        assert ranks_are_equal(model)
        said = any("could not be run again" in line for line in report.evidence)
        assert said == fails, report
        optimizer.detach()
"""

DETACH = """
model, optimizer = make()
train(model, optimizer, range(2))
if RANK == 0:
    optimizer.detach()
train(model, optimizer, range(2, 6), lambda step: step == 4)
if RANK == 1:
    assert any("judged by itself" in line for line in optimizer.last_report.evidence), optimizer.last_report
optimizer.detach()

def detach(report):
    if RANK == 0:
        optimizer.detach()

model, optimizer = make(on_overflow=detach)
train(model, optimizer, range(5), lambda step: step in (2, 4) and RANK == 1)
assert optimizer.last_report.step == (3 if RANK == 0 else 5)
optimizer.detach()

model, optimizer = make(on_overflow=lambda report: optimizer.detach() and None)  # on all ranks
train(model, optimizer, range(4), lambda step: step == 2 and RANK == 1)
assert optimizer.last_report.step == 3
"""

CAUGHT = """
class Fails(Model):
    def forward(self, x):
        if self.fails and not is_rerunning():
            raise torch.OutOfMemoryError("planted")
        return super().forward(x)

model, optimizer = make(Fails)
model.module.fails = False
for step in range(6):
    model.module.fails = step == 2
    try:
        model(batch(step, step == 4 and RANK == 1)).backward()
        optimizer.step()
    except torch.OutOfMemoryError:
        pass
    optimizer.zero_grad()
assert (optimizer.last_report.verdict, optimizer.last_report.first.rank) == ("input_nonfinite", 1)
assert ranks_are_equal(model)
"""

CASES = {
    "local steps": LOCAL_STEPS,
    "accumulation": ACCUMULATION,
    "uneven data": UNEVEN,
    "collectives of the model": OWN_COLLECTIVES,
    "detach": DETACH,
    "exceptions that are caught": CAUGHT,
}


@pytest.mark.multiprocess
def test_nothing_hangs_and_what_is_healthy_keeps_its_bits(tmp_path):
    script = HEAD + "".join(f'print("begin: {name}", flush=True)\n{case}' for name, case in CASES.items()) + TAIL
    for output in run_ranks(script, tmp_path, timeout=170):
        assert "done" in output


ALONE = """
model, optimizer = make()
train(model, optimizer, range(2))
model(batch(2)).backward()
if RANK == 1:
    model.module.first.weight.grad[0, 0] = float("inf")  # after the reduction: the other rank has nothing to report
optimizer.step()
if RANK == 1:
    assert any("not every rank has come" in line for line in optimizer.last_report.evidence), optimizer.last_report
else:
    assert optimizer.last_report is None
"""


@pytest.mark.multiprocess
def test_a_rank_that_alone_is_bad_after_the_reduction_does_not_wait_for_ever(tmp_path):
    script = HEAD.replace("timedelta(seconds=60)", "timedelta(seconds=10)") + ALONE + TAIL
    for output in run_ranks(script, tmp_path, timeout=100):
        assert "done" in output
