"""GuardedOptimizer in two real processes: gradients that every rank has, and gradients of which each has a part."""

from __future__ import annotations

import pytest

from deepspeed_support import run_ranks

COMMON = """
import logging, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
import adapter_support as support
import hallo_numguard as ng

logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")
dist.init_process_group("gloo")
RANK = dist.get_rank()
AdamW = torch.optim.AdamW
SGD = torch.optim.SGD  # Adam makes full steps of gradients that are nothing but rounding
CLEAN, SKIPPED, STOPPED = [True] * 6, [True, True, False, True, True, True], [True, True, False]

def train(make, wrap, plant=lambda *_: None, guard=True, clip=None, scale=None):
    '''Trains; returns the optimizer, what was reported, and what this rank holds of the weights.'''
    faulty = support.Faulty("none")
    model, reports = faulty.model, faulty.reports
    called, given = wrap(model)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if guard:
        optimizer = ng.GuardedOptimizer(optimizer, given, ng.GuardConfig(), reports.append, clip_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    plant(optimizer, model)
    for step in range(1, 7):
        optimizer.zero_grad()
        arguments, target = faulty.batch(step)
        loss = model.loss(called(*arguments), target)
        if guard:
            optimizer.watch_loss(loss)
        scaler.scale(loss).backward()
        if clip is not None and not guard:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        try:
            scaler.step(optimizer)
        except ng.NumericsError:
            break
        scaler.update()
    return optimizer, reports, held_by(model)

def held_by(model):
    return [support.local(p).clone() for p in model.parameters()]

def check(run, applied, *expected):
    '''Compares what was reported (verdict; kind, name, index and rank of the first offender), and what was applied.'''
    optimizer, reports, _ = run
    found = [(r.verdict, r.first.kind, r.first.name, r.first.index, r.first.rank, r.world_size) for r in reports]
    assert found == [(*one, 2) for one in expected], found
    assert [record.applied for record in optimizer.history] == applied, optimizer.history

def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))

def close(left, right):
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(left, right, strict=True))
"""


def run(script, folder, **options):
    for output in run_ranks(f'{COMMON}{script}\nprint("done")', folder, **options):
        assert "done" in output


DDP = """
def ddp(model):
    wrapped = DistributedDataParallel(model)
    return wrapped, wrapped

def bare(model):
    return DistributedDataParallel(model), model

def bad_input(optimizer, model):
    ng.inject(model, "input", index=(2, 3, 1), step=3, rank=1)

def bad_weight(optimizer, model):
    ng.inject(model, "parameter", model.trainable, index=(4, 5), step=3)

def bad_activation(optimizer, model):
    ng.inject(model, "activation", model.module, value=float("inf"), step=3, rank=1)

plain = train(AdamW, ddp, guard=False)[2]
name = "blocks.1.mlp.0"
for wrap in (ddp, bare):
    clean = train(AdamW, wrap)
    check(clean, CLEAN)
    assert same(plain, clean[2])
    check(train(AdamW, wrap, bad_input), SKIPPED, ("input_nonfinite", "input", "features", (2, 3, 1), 1))
    check(train(AdamW, wrap, bad_weight), STOPPED, ("weights_nonfinite", "parameter", f"{name}.weight", (4, 5), 0))
    check(train(AdamW, wrap, bad_activation), SKIPPED, ("forward_nonfinite", "activation", name, (0, 0, 0), 1))

clipped = train(SGD, ddp, scale=2.0**10, clip=0.1)
check(clipped, CLEAN)
assert close(train(SGD, ddp, guard=False, scale=2.0**10, clip=0.1)[2], clipped[2])

def failing(optimizer, model):
    '''The guard of rank 0 fails in step 2; a bad batch on rank 1 follows in step 3.'''
    bad_input(optimizer, model)
    if RANK == 0:
        gradients = optimizer._guard._gradients
        read, calls = gradients.read, []
        def broken(collected):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("planted")
            return read(collected)
        gradients.read = broken

optimizer, reports, held = train(AdamW, ddp, failing)
assert [(report.step, report.verdict, report.first.rank) for report in reports] == [(3, "input_nonfinite", 1)]
assert all(bool(p.isfinite().all()) for p in held)
"""


def test_ranks_that_share_gradients_say_the_same(tmp_path):
    run(DDP, tmp_path, contains_failures=True)


FSDP2 = """
from torch.distributed.fsdp import fully_shard

def sharded(shape):
    def wrap(model):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape):])
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        return model, model
    return wrap

for shape in ((2,), (2, 1), (1, 2)):
    wrap = sharded(shape)
    clean = train(AdamW, wrap)
    check(clean, CLEAN)
    assert same(train(AdamW, wrap, guard=False)[2], clean[2])
    for scale in (None, 2.0**10):
        clipped = train(SGD, wrap, clip=0.1, scale=scale)
        check(clipped, CLEAN)
        assert close(train(SGD, wrap, guard=False, clip=0.1, scale=scale)[2], clipped[2])

wrap, name = sharded((2,)), "blocks.1.mlp.0"
for kind, where, index, rank, applied, expected in (
    ("parameter", f"{name}.weight", (31, 15), None, STOPPED, ("weights_nonfinite", 1)),
    ("parameter", "projection.weight", (0, 3), None, STOPPED, ("weights_nonfinite", 0)),
    ("optimizer_state", f"{name}.weight", (20, 5), None, [True, *STOPPED], ("optimizer_state_nonfinite", 1)),
    ("input", None, (2, 3, 1), 1, SKIPPED, ("input_nonfinite", 1)),
    ("activation", name, None, 1, SKIPPED, ("forward_nonfinite", 1)),
):
    def plant(optimizer, model):
        ng.inject(optimizer, kind, where, index=index, step=3, rank=rank)
    verdict, culprit = expected
    check(train(AdamW, wrap, plant), applied, (verdict, kind, where or "features", index or (0, 0, 0), culprit))
"""


def test_ranks_that_hold_slices_find_the_element_together(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
    run(FSDP2, tmp_path)


FSDP2_BACKWARD = """
from hallo_numguard.tracing import rerun
from torch.distributed.fsdp import fully_shard

rerun.MAX_GRADIENT_BYTES = 200  # several backward passes for all gradients

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, is_bad):
        y = self.up(x).relu()
        return x + self.down((y * 0).sqrt() if is_bad else y)

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, is_bad):
        for number, block in enumerate(self.blocks):
            x = block(x, is_bad and number == 1)
        return x

def run(guard):
    torch.manual_seed(0)
    model = Stack()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if guard:
        optimizer = ng.GuardedOptimizer(optimizer, model)
    for step in range(1, 5):
        is_bad = step == 3 and RANK == 1
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step + 10 * RANK))
        model(x, is_bad).square().mean().backward()
        if guard or step != 3:
            optimizer.step()
    return optimizer, held_by(model)

optimizer, weights = run(True)
assert same(weights, run(False)[1])
report = optimizer.last_report
assert (report.step, report.verdict, report.first.module, report.first.rank) == (3, "backward_nonfinite", "blocks.1", 1)
assert "sqrt" in report.first.line, report
"""


def test_the_backward_pass_of_sharded_parameters_is_run_again(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
    run(FSDP2_BACKWARD, tmp_path)


TENSOR_PARALLEL = """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))

def run(guard, clip=None, index=None):
    torch.manual_seed(0)
    model = parallelize_module(
        Two(), init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if guard:
        optimizer = ng.GuardedOptimizer(optimizer, model, clip_norm=clip)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).sum(dim=0).square().sum().backward()
        if index is not None and step == 1:
            gradient = model.down.weight.grad.to_local()
            row, column = index[0], index[1] - RANK * 4
            if 0 <= column < 4:
                gradient[row, column] = float("inf")
        if clip is not None and not guard:
            total = sum(g.full_tensor().square().sum() if hasattr(g, "full_tensor") else g.square().sum()
                        for g in (p.grad for p in model.parameters())).sqrt()
            for p in model.parameters():
                support.local(p.grad).mul_(min(1.0, clip / float(total)))
        optimizer.step()
    return optimizer, held_by(model)

assert same(run(False)[1], run(True)[1])
assert close(run(False, 0.5)[1], run(True, 0.5)[1])
optimizer, _ = run(True, index=(3, 6))
assert [(one.name, one.index) for one in optimizer.last_report.offenders] == [("down.weight", (3, 6))]
assert [record.applied for record in optimizer.history] == [True, False, True]
"""


def test_blocks_of_columns_have_the_whole_matrixs_index(tmp_path):
    run(TENSOR_PARALLEL, tmp_path)
