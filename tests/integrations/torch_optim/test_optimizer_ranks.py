"""GuardedOptimizer in two real processes: gradients that every rank has, and gradients of which each has a part."""

from __future__ import annotations

import json

import pytest

from deepspeed_support import run_ranks

COMMON = """
import json, logging, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
import hallo_numguard as ng
from campaign.models import MODELS

logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")
dist.init_process_group("gloo")
RANK = dist.get_rank()

def train(make, wrap, plant=lambda *_: None, guard=True, steps=6, clip=None, scale=None, name="transformer"):
    '''Trains; returns what was reported, and what this rank holds of the weights.'''
    torch.manual_seed(0)
    model = MODELS[name]()
    called, given = wrap(model)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    reports = []
    if guard:
        optimizer = ng.GuardedOptimizer(optimizer, given, ng.GuardConfig(), reports.append, clip_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    plant(optimizer, model)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        arguments, target = model.batch(torch.Generator().manual_seed(10 * step + RANK), torch.float32)
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
    held = [(p.to_local() if hasattr(p, "to_local") else p).detach().clone() for p in model.parameters()]
    return optimizer, reports, held

def told(reports):
    return [[r.verdict, r.first.kind, r.first.name, r.first.index, r.first.rank, r.world_size] for r in reports]

def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))

def close(left, right):
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(left, right, strict=True))

def say(**what):
    print("SAID", json.dumps(what), flush=True)

AdamW = torch.optim.AdamW
SGD = torch.optim.SGD  # Adam makes full steps of gradients that are nothing but rounding
"""


def said(script, folder, **options):
    outputs = run_ranks(COMMON + script, folder, **options)
    return [
        [json.loads(line.removeprefix("SAID ")) for line in output.splitlines() if line.startswith("SAID ")]
        for output in outputs
    ]


DDP = """
def ddp(model):
    wrapped = DistributedDataParallel(model)
    return wrapped, wrapped

def bare(model):
    return DistributedDataParallel(model), model

plain = train(AdamW, ddp, guard=False)[2]
for wrap in (ddp, bare):
    optimizer, reports, held = train(AdamW, wrap)
    say(same=same(plain, held), reports=told(reports), applied=[r.applied for r in optimizer.history])

def bad_input(optimizer, model):
    ng.inject(model, "input", index=(2, 3, 1), step=3, rank=1)

def bad_weight(optimizer, model):
    ng.inject(model, "parameter", model.trainable, index=(4, 5), step=3)

def bad_activation(optimizer, model):
    ng.inject(model, "activation", model.module, value=float("inf"), step=3, rank=1)

for plant in (bad_input, bad_weight, bad_activation):
    for wrap in (ddp, bare):
        optimizer, reports, held = train(AdamW, wrap, plant)
        say(reports=told(reports), applied=[r.applied for r in optimizer.history])

optimizer, reports, held = train(SGD, ddp, scale=2.0**10, clip=0.1)
say(close=close(train(SGD, ddp, guard=False, scale=2.0**10, clip=0.1)[2], held), reports=told(reports))

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
finite = all(bool(p.isfinite().all()) for p in held)
say(active=optimizer._guard.active, reports=told(reports), finite=finite)
"""


def test_ranks_that_share_gradients_say_the_same(tmp_path):
    ranks = said(DDP, tmp_path, contains_failures=True)
    assert ranks[0] == ranks[1]
    clean, faults, (scaled, failed) = ranks[0][:2], ranks[0][2:8], ranks[0][8:]
    for run in clean:
        assert run == {"same": True, "reports": [], "applied": [True] * 6}
    skipped = [True, True, False, True, True, True]
    for run in faults[:2]:
        assert run["reports"] == [["input_nonfinite", "input", "features", [2, 3, 1], 1, 2]]
        assert run["applied"] == skipped
    for run in faults[2:4]:
        assert run["reports"] == [["weights_nonfinite", "parameter", "blocks.1.mlp.0.weight", [4, 5], 0, 2]]
        assert run["applied"] == [True, True, False]
    for run in faults[4:]:
        assert run["reports"] == [["forward_nonfinite", "activation", "blocks.1.mlp.0", [0, 0, 0], 1, 2]]
        assert run["applied"] == skipped
    assert scaled == {"close": True, "reports": []}
    assert failed == {"active": False, "reports": [], "finite": True}


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
    plain = train(AdamW, wrap, guard=False)[2]
    optimizer, reports, held = train(AdamW, wrap)
    say(same=same(plain, held), reports=told(reports), applied=[r.applied for r in optimizer.history])
    for scale in (None, 2.0**10):
        optimizer, reports, held = train(SGD, wrap, clip=0.1, scale=scale)
        say(close=close(train(SGD, wrap, guard=False, clip=0.1, scale=scale)[2], held), reports=told(reports))

wrap = sharded((2,))
for kind, name, where, rank in (
    ("parameter", "blocks.1.mlp.0.weight", (31, 15), None),
    ("parameter", "projection.weight", (0, 3), None),
    ("optimizer_state", "blocks.1.mlp.0.weight", (20, 5), None),
    ("input", None, (2, 3, 1), 1),
    ("activation", "blocks.1.mlp.0", None, 1),
):
    def plant(optimizer, model):
        ng.inject(optimizer, kind, name, index=where, step=3, rank=rank)
    optimizer, reports, held = train(AdamW, wrap, plant)
    say(reports=told(reports), applied=[r.applied for r in optimizer.history])
"""


def test_ranks_that_hold_slices_find_the_element_together(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
    ranks = said(FSDP2, tmp_path)
    assert ranks[0] == ranks[1]
    clean, faults = ranks[0][:9], ranks[0][9:]
    for at, run in enumerate(clean):
        assert run.pop("same" if at % 3 == 0 else "close")
        assert run["reports"] == []
    once, at_once, later = [True] * 2 + [False] + [True] * 3, [True] * 2 + [False], [True] * 3 + [False]
    name = "blocks.1.mlp.0"
    assert faults == [
        {"reports": [["weights_nonfinite", "parameter", f"{name}.weight", [31, 15], 1, 2]], "applied": at_once},
        {"reports": [["weights_nonfinite", "parameter", "projection.weight", [0, 3], 0, 2]], "applied": at_once},
        {
            "reports": [["optimizer_state_nonfinite", "optimizer_state", f"{name}.weight", [20, 5], 1, 2]],
            "applied": later,
        },
        {"reports": [["input_nonfinite", "input", "features", [2, 3, 1], 1, 2]], "applied": once},
        {"reports": [["forward_nonfinite", "activation", name, [0, 0, 0], 1, 2]], "applied": once},
    ]


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
                (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).mul_(min(1.0, clip / float(total)))
        optimizer.step()
    held = [(p.to_local() if hasattr(p, "to_local") else p).detach().clone() for p in model.parameters()]
    return optimizer, held

say(same=same(run(False)[1], run(True)[1]), close=close(run(False, 0.5)[1], run(True, 0.5)[1]))
optimizer, held = run(True, index=(3, 6))
report = optimizer.last_report
say(offenders=[[o.name, o.index] for o in report.offenders], applied=[r.applied for r in optimizer.history])
"""


def test_blocks_of_columns_have_the_whole_matrixs_index(tmp_path):
    ranks = said(TENSOR_PARALLEL, tmp_path)
    assert ranks[0] == ranks[1]
    assert ranks[0] == [
        {"same": True, "close": True},
        {"offenders": [["down.weight", [3, 6]]], "applied": [True, False, True]},
    ]
