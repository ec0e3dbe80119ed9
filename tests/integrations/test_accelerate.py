"""attach() to an Accelerator without DeepSpeed: the campaign's faults, clipping, accumulation, scalers, two ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import adapter_support as support
import deepspeed_support
from campaign.models import UNet

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("cpu_alone")


def train(faulty, guarded=True, accumulate=1, precision="no", scaler=None, clip=1.0):
    """Trains with a loop as Accelerate's documentation has it. Returns the guard and whether it raised."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    if scaler is not None:
        accelerator.scaler = scaler
    trained = [parameter for parameter in faulty.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    model, optimizer, scheduler = accelerator.prepare(faulty.model, optimizer, scheduler)
    guard = ng.attach(accelerator, faulty.config, faulty.reports.append) if guarded else None
    faulty.plant(optimizer)
    raised = False
    try:
        for step in range(accumulate, faulty.steps * accumulate + accumulate):
            with accelerator.accumulate(model):
                arguments, target = faulty.batch(step // accumulate)
                loss = faulty.model.loss(model(*arguments), target)
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    except ng.NumericsError:
        raised = True
    if guard is not None:
        guard.detach()
    return guard, raised, scheduler.get_last_lr()[0]


def test_the_learning_rate_moves_on_with_steps_that_were_made():
    guard, _, rate = train(support.Faulty("input"))
    applied = [record.applied for record in guard.history]
    assert applied.count(False) == 1
    assert rate == pytest.approx(1e-3 * 0.9 ** applied.count(True))


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_step_that_the_script_gives_up_after_clipping(clip):
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard = ng.attach(accelerator)
    for step in range(1, 5):
        accelerator.backward(model(torch.ones(2, 4)).mean() * (float("inf") if step == 2 else 1))
        getattr(accelerator, clip)(model.parameters(), 1.0)
        if step != 2:
            optimizer.step()
        optimizer.zero_grad()
    assert [record.applied for record in guard.history] == [True, False, True, True]
    assert guard.last_report is None
    assert torch.isfinite(model.weight).all()
    guard.detach()


def test_several_optimizers_are_guarded_each():
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    models = [nn.Linear(4, 4), UNet()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    guard = ng.attach(accelerator)
    for step in range(1, 4):
        for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
            arguments, _ = UNet.batch(torch.Generator().manual_seed(step), torch.float32)
            output = model(torch.randn(3, 4)) if isinstance(model, nn.Linear) else model(*arguments)
            accelerator.backward(output.square().mean() * (float("nan") if step == 2 and model is models[1] else 1))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert [record.applied for record in guard.history] == [True, True, True, True, False, True]
    assert guard.last_report.step == 2
    guard.detach()
    assert not {"backward", "clip_grad_norm_", "clip_grad_value_"} & vars(accelerator).keys()
    assert not any("step" in vars(optimizer) for optimizer in prepared[2:])
    guard = ng.attach(accelerator)
    with pytest.raises(ng.InvalidInput, match="guarded already"):
        ng.attach(accelerator)
    guard.detach()


class FixedScaler(torch.amp.GradScaler):
    """As Accelerate makes it where a GPU is there."""

    def __init__(self, scale=2.0**8):
        super().__init__("cpu", init_scale=scale, growth_interval=1000)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_goes_back_to_its_last_healthy_checkpoint(scaled, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    if scaled:
        accelerator.scaler = FixedScaler()
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    keeper = ng.CheckpointKeeper(tmp_path, healthy_after=1)
    guard = ng.attach(accelerator, ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback")))
    kept = {}
    for step in range(1, 7):
        if step == 4:
            with torch.no_grad():
                model.weight[0, 1] = float("nan")
        accelerator.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            kept = support.weights(model)
            keeper.save(accelerator)
        if step == 4:
            support.assert_same_bits(support.weights(model), kept)
    assert [record.applied for record in guard.history] == [True, True, True, False, True, True]
    assert guard.last_report.verdict == ng.Verdict.WEIGHTS_NONFINITE
    assert {record.loss_scale for record in guard.history} == {2.0**8 if scaled else 1.0}
    guard.detach()


def test_what_cannot_be_guarded_is_told():
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ng.InvalidInput, match=r"after accelerator\.prepare"):
        ng.attach(accelerator)
    model = nn.Linear(2, 2)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ng.InvalidInput, match="no model that its optimizer trains"):
        ng.attach(accelerator)
    accelerator.prepare(model)
    guard = ng.attach(accelerator)
    with pytest.raises(ng.InvalidInput, match="takes no closure"):
        optimizer.step(lambda: None)
    guard.detach()
    other = accelerate.Accelerator(cpu=True)
    other.prepare(model, ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model))
    with pytest.raises(ng.InvalidInput, match="guarded already"):
        ng.attach(other)


RANKS = """
import sys
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
import hallo_numguard as ng
from campaign.models import Transformer

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index

class Untied(Transformer):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(16, 16, bias=False)

def train(guarded):
    torch.manual_seed(0)
    if "SHARDED" == "FSDP":  # Accelerate offers its plug-in on GPUs only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
    model = Untied()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = ng.attach(accelerator, ng.GuardConfig(local_gradients="always")) if guarded else None
    for step in range(1, 6):
        (tokens, features), target = Transformer.batch(torch.Generator().manual_seed(step + 100 * rank), torch.float32)
        if guarded == "faulty" and step == 3 and rank == 1:
            features[2, 3, 1] = float("nan")
        accelerator.backward(Transformer.loss(model(tokens, features), target))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if guard is not None:
        guard.detach()
    accelerator.free_memory()
    weights = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
    return guard, weights

guard, guarded = train("clean")
assert all(record.applied for record in guard.history) and guard.last_report is None
_, plain = train(None)
assert all(torch.equal(a, b) for a, b in zip(guarded, plain))
guard, _ = train("faulty")
first = guard.last_report.first
assert [record.applied for record in guard.history] == [True, True, False, True, True], guard.history
assert (guard.last_report.verdict, first.name, first.index, first.rank) == ("input_nonfinite", "features", (2, 3, 1), 1)
print("done", type(next(iter(guarded))))
"""


@pytest.mark.parametrize("sharded", ["DDP", "FSDP"])
def test_two_ranks(sharded, tmp_path):
    for output in deepspeed_support.run_ranks(RANKS.replace("SHARDED", sharded), tmp_path):
        assert "done" in output
