"""attach() to an Accelerator without DeepSpeed: what only its scripts do; test_contract.py has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support
from campaign.models import UNet

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("cpu_alone")


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
    assert (guard.last_report.step, guard.last_report.first.kind) == (2, "loss")
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


def test_what_cannot_be_guarded_is_refused():
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


def prepared(folder=None, model=None, **configuration):
    accelerator = accelerate.Accelerator(
        cpu=True, project_config=accelerate.utils.ProjectConfiguration(folder, **configuration)
    )
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def one_step(accelerator, model, optimizer):
    accelerator.backward(model(torch.ones(4, 4) + torch.arange(4)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("where", ["parameter", "buffer", "optimizer_state"])
def test_a_state_with_nan_deletes_no_older_one(where, tmp_path):
    accelerator, model, optimizer = prepared(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    guard = ng.attach(accelerator)
    one_step(accelerator, model, optimizer)
    accelerator.save_state()
    with torch.no_grad():
        {
            "parameter": model[0].weight,
            "buffer": model[1].running_var,
            "optimizer_state": optimizer.optimizer.state[model[0].bias]["exp_avg"],
        }[where].flatten()[3] = float("nan")
    with pytest.raises(ng.NumericsError, match=r"^Accelerator\.save_state was about to write") as caught:
        accelerator.save_state()
    assert caught.value.report.first.kind == where
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]
    if where == "optimizer_state":  # which it does not write
        accelerator.save_model(model, tmp_path / "model")
    else:
        with pytest.raises(ng.NumericsError, match=r"^Accelerator\.save_model was about to write"):
            accelerator.save_model(model, tmp_path / "model")
    accelerator.save_model(nn.Linear(2, 2), tmp_path / "other")
    keeper = ng.CheckpointKeeper(tmp_path / "kept")
    with pytest.raises(ng.NumericsError, match="save_state"):  # not the guard's keeper
        keeper.save(accelerator, step=1)
    guard.detach()
    accelerator.save_model(model, tmp_path / "model")


def test_the_keeper_of_a_guard_checks_once(tmp_path):
    accelerator, model, _ = prepared()
    keeper = ng.CheckpointKeeper(tmp_path)
    guard = ng.attach(accelerator, ng.GuardConfig(keeper=keeper))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ng.NumericsError, match=r"^CheckpointKeeper\.save was about to write"):
        keeper.save(accelerator, step=1)
    guard.detach()
    assert keeper.save_gates == []


def clipped(guarded, scale, dtype=torch.half, max_norm=1.0, parameters=None):
    """What clipping returned, and the clipped gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(dtype)
    accelerator, model, _ = prepared(model=model)
    guard = ng.attach(accelerator) if guarded else None
    torch.manual_seed(1)
    output = model(torch.randn(32, 64).to(dtype))
    accelerator.backward((output.float() - torch.randn(32, 64)).square().sum() * scale)
    norm = accelerator.clip_grad_norm_(parameters or model.parameters(), max_norm)
    if guard is not None:
        guard.detach()
    return norm, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.half, 2.0**9), (torch.float32, 1e18), (torch.bfloat16, 1e18)])
def test_finite_gradients_are_clipped_by_their_norm_though_it_is_infinite_in_their_dtype(dtype, scale):
    norm, gradients = clipped(False, scale, dtype)
    assert norm.isinf()
    assert not any(gradient.any() for gradient in gradients)  # as without a guard: multiplied by 0
    norm, gradients = clipped(True, scale, dtype)
    assert norm.isfinite()
    total = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    assert total == pytest.approx(1.0, rel=0.01)


def test_two_optimizers_whose_norms_are_finite_and_that_of_both_is_not():
    models = [nn.Linear(4, 1, bias=False).half() for _ in range(2)]
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(*models, *[torch.optim.SGD(model.parameters(), lr=0.1) for model in models])
    guard = ng.attach(accelerator)
    for model in prepared[:2]:
        accelerator.backward(model(torch.full((1, 4), 25000.0).half()).float().sum())
    norm = accelerator.clip_grad_norm_([model.weight for model in models], 1.0)
    assert norm == pytest.approx(50000.0 * 2**0.5, rel=1e-3)
    assert all(model.weight.grad.float().norm() == pytest.approx(0.5**0.5, rel=1e-3) for model in models)
    guard.detach()


@pytest.mark.parametrize(("scale", "max_norm"), [(1.0, 1.0), (1.0, 1e9), (80.0, 1.0), (float("nan"), 1.0)])
def test_gradients_whose_norm_is_finite_or_that_are_not_are_clipped_by_the_bits_of_torch(scale, max_norm):
    (plain_norm, plain), (norm, gradients) = (clipped(guarded, scale, max_norm=max_norm) for guarded in (False, True))
    assert torch.equal(plain_norm.nan_to_num(), norm.nan_to_num())
    assert norm.dtype == plain_norm.dtype
    for one, other in zip(plain, gradients, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


RANKS = """
import os, sys
import accelerate, torch
from torch import nn
import hallo_numguard as ng

torch.set_num_threads(1)
rank = int(os.environ["RANK"])

def run(naming, folder):
    accelerator = accelerate.Accelerator(
        cpu=True, project_config=accelerate.utils.ProjectConfiguration(folder, automatic_checkpoint_naming=naming)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    guard = ng.attach(accelerator)
    accelerator.backward(model(torch.ones(2, 4)).square().mean())
    optimizer.step()
    return accelerator, model, guard

accelerator, model, guard = run(True, "OUT/named")
accelerator.save_state()
if rank == 1:
    model.module[0].weight.data[3, 1] = float("nan")
try:
    accelerator.save_state()  # waits for all of them: they agree
    raise AssertionError("saved")
except ng.NumericsError as error:
    first = error.report.first
    assert (first.name, first.index, first.rank) == ("0.weight", (3, 1), 1), first
accelerator.wait_for_everyone()
guard.detach()

accelerator, model, guard = run(False, "OUT/alone")
if rank == 0:  # as the training scripts of diffusers do
    accelerator.save_state("OUT/alone")
    accelerator.save_model(model, "OUT/alone/model")
    model.module[0].weight.data[3, 1] = float("nan")
    for save in (lambda: accelerator.save_state("OUT/bad"), lambda: accelerator.save_model(model, "OUT/bad")):
        try:
            save()
            raise AssertionError("saved")
        except ng.NumericsError:
            pass
accelerator.wait_for_everyone()
accelerator.end_training()
print("done")
"""


def test_ranks_agree_where_all_of_them_save_and_one_alone_waits_for_nobody(tmp_path):
    for output in deepspeed_support.run_ranks(RANKS.replace("OUT", str(tmp_path)), tmp_path):
        assert "done" in output
    assert not (tmp_path / "bad").exists()
    assert [path.name for path in (tmp_path / "named" / "checkpoints").iterdir()] == ["checkpoint_0"]
