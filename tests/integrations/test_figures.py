"""A step's figures: of the whole model, on every rank alike; the mean loss of its micro-batches; the step's number."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from engine_ranks import run_engines
from torch import nn

import hallo_numguard as ng

import deepspeed_support
from deepspeed_support import run_ranks

BATCHES = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]


class Square(nn.Module):
    """Returns its loss."""

    def __init__(self, share: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.share = share

    def forward(self, x, labels=None):
        return {"loss": self.layer(x).square().mean() / self.share}


def of_two_batches():
    """The mean losses, and the gradient norms of the means, of the pairs of batches; SGD makes the steps."""
    model = Square()
    losses, norms = [], []
    for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        loss = (model(first)["loss"] + model(second)["loss"]) / 2
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(math.hypot(*(parameter.grad.norm().item() for parameter in model.parameters())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return losses, norms


def check(guard):
    losses, norms = of_two_batches()
    assert [record.loss for record in guard.history] == pytest.approx(losses, rel=1e-5)
    assert [record.norm for record in guard.history] == pytest.approx(norms, rel=1e-5)
    assert float(guard.grad_norm) == pytest.approx(norms[-1], rel=1e-5)


def train_by_hand(optimizer, model, backward, show=lambda loss: loss):
    for at, batch in enumerate(BATCHES):
        backward(show(model(batch)["loss"]) / 2)
        if at % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_the_loss_of_micro_batches_in_plain_pytorch_and_the_norm_before_clipping():
    model = Square()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ng.GuardedOptimizer(optimizer, model)
    assert math.isnan(optimizer.grad_norm)
    train_by_hand(optimizer, model, torch.Tensor.backward, optimizer.watch_loss)
    check(optimizer)
    clipping = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=1e-3)
    model(BATCHES[0])["loss"].backward()
    clipping.step()
    assert float(clipping.grad_norm) > 0.01


def test_the_norm_is_unscaled_and_nan_where_a_gradient_is():
    model = Square()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(BATCHES[0])["loss"]).backward()
    expected = math.hypot(*(parameter.grad.norm().item() for parameter in model.parameters())) / 2**10
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm.shape == ()
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)
    optimizer.zero_grad()
    scaler.scale(model(BATCHES[0] * math.nan)["loss"]).backward()
    scaler.step(optimizer)
    assert math.isnan(optimizer.grad_norm)
    assert math.isnan(optimizer.history[-1].norm)
    assert optimizer.history[-1].nonfinite == 20


def test_a_disabled_guard_has_a_norm_that_can_be_logged(monkeypatch):
    monkeypatch.setenv("HALLO_NUMGUARD_DISABLE", "1")
    model = Square()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(BATCHES[0])["loss"].backward()
    optimizer.step()
    assert isinstance(optimizer.grad_norm.item(), float)


@pytest.mark.usefixtures("cpu_alone")
def test_the_loss_of_micro_batches_under_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Square()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard = ng.attach(accelerator)
    for batch in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    check(guard)
    guard.detach()


@pytest.mark.usefixtures("cpu_alone")
@pytest.mark.parametrize("resumes", [False, True])
def test_the_trainers_loss_and_step_numbers(resumes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    data = [{"x": row, "labels": 0} for batch in BATCHES for row in batch]
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **settings,
    )
    for start in (None, str(tmp_path / "checkpoint-2"))[: 1 + resumes]:
        trainer = transformers.Trainer(Square(), arguments, train_dataset=data)
        guard = ng.attach(trainer)
        trainer.train(resume_from_checkpoint=start)
        guard.detach()
    rows = [row for row in trainer.state.log_history if "loss" in row][-len(guard.history) :]
    assert [record.step for record in guard.history] == [row["step"] for row in rows] == [1, 2, 3, 4][2 * resumes :]
    assert [record.loss for record in guard.history] == pytest.approx([row["loss"] for row in rows], abs=1e-3)
    if not resumes:
        check(guard)


@pytest.mark.usefixtures("cpu_alone")
def test_lightnings_loss_and_step_numbers(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Square()

        def training_step(self, batch, batch_idx):
            return self.net(batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(BATCHES, batch_size=None)

    def fit(steps, start=None):
        guard = ng.integrations.LightningNumGuardCallback()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=2,
            callbacks=[guard],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), ckpt_path=start)
        return trainer, guard

    trainer, guard = fit(4)
    check(guard)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    _, guard = fit(6, tmp_path / "saved.ckpt")
    assert [record.step for record in guard.history] == [5, 6]


@pytest.mark.usefixtures("cpu_alone")
@pytest.mark.parametrize("divides", [False, True])
def test_deepspeeds_loss_of_micro_batches(divides):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    model = Square()
    engine = deepspeed_support.make_engine(
        "fp32",
        model=model,
        optimizer_of=lambda groups: torch.optim.SGD(groups, lr=0.1),
        train_micro_batch_size_per_gpu=3,
        gradient_accumulation_steps=2,
    )
    guard = ng.attach(engine)
    for batch in BATCHES:
        loss = engine(batch)["loss"]
        engine.backward(*((loss / 2,) if divides else (loss,)), **({"scale_wrt_gas": False} if divides else {}))
        engine.step()
    check(guard)
    guard.detach()


SLICES = """
import math
KINDS = [
    ("fp16", 1, False), ("fp16", 2, False), ("fp16", 2, True), ("bf16", 2, False), ("bf16_fp32", 2, False),
    ("fp16", 3, False), ("fp32", 3, False), ("bf16", 3, True), ("bf16_fp32", 1, False), ("fp32", 0, False),
]

class Figures:
    def __init__(self):
        self.rows, self.reports = {}, []

    def write(self, step, figures):
        self.rows[step] = figures

    def report(self, report):
        self.reports.append(report)

def close(left, right):
    return math.isclose(left, right, rel_tol=1e-5)

for setup, stage, offload in KINDS:
    engine, sink = support.make_engine(setup, stage=stage, offload=offload), Figures()
    guard = ng.attach(engine, ng.GuardConfig(sinks=[sink]))
    norms = []
    for step in range(3):
        support.train_step(engine, step)
        norms.append(engine.get_global_grad_norm())
        if norms[-1] is not None:
            assert close(float(guard.grad_norm), float(norms[-1])), (setup, stage, offload)
    rows = guard.history
    assert [row.step for row in rows] == [1, 2, 3]
    for row, norm in zip(rows, norms):
        assert norm is None or close(row.norm / row.loss_scale, float(norm))
        assert row.nonfinite == 0
    engine.module.hidden.weight.register_hook(plant_in_gradient((23, 15)))
    support.train_step(engine, 3)
    last = guard.history[-1]
    assert not last.applied and math.isnan(last.norm) and math.isnan(guard.grad_norm), (setup, stage, offload, last)
    assert last.nonfinite == 1 and last == guard.last_report.history[-1], last
    print("|", [(row.norm, row.absmax, row.nonfinite, row.applied) for row in guard.history])
    guard.detach()
    if RANK == 0:
        assert [sink.rows[row.step]["gradient_absmax"] for row in rows] == [row.absmax / row.loss_scale for row in rows]
        assert [sink.rows[row.step]["gradient_norm"] for row in rows] == [row.norm / row.loss_scale for row in rows]
        assert math.isnan(sink.rows[4]["gradient_norm"]) and sink.rows[4]["gradient_nonfinite"] == 1
    for step in range(4, 8):
        support.train_step(engine, step)
    assert "step" not in vars(engine.optimizer), "after the last steps of ranks that may have waited"
"""


def test_figures_under_deepspeed_are_the_whole_models_on_every_rank():
    first, second = run_engines(SLICES)
    assert first.count("|") == 10
    assert [line for line in first.splitlines() if "|" in line] == [
        line for line in second.splitlines() if "|" in line
    ], "the same on every rank"


LEAVES = """
engine = support.make_engine("fp16", stage=2)
guard = ng.attach(engine)
for step in range(2):
    support.train_step(engine, step)
if RANK == 1:
    guard.detach()
for step in range(2, 5):
    support.train_step(engine, step)
print(len(guard.history))
if RANK == 0:
    assert str(guard.history[-1].norm) == "nan", "of a slice alone it would be another model's"
    guard.detach()
for step in range(5, 8):
    support.train_step(engine, step)
assert "step" not in vars(engine.optimizer)
"""


def test_a_rank_that_detaches_alone_keeps_nobody_waiting():
    assert [output.split()[-1] for output in run_engines(LEAVES)] == ["5", "2"]


FSDP2 = """
import math
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import hallo_numguard as ng

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, clip_norm=1e-3)
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 5) * (math.nan if step == 2 else 1)).square().mean().backward()
    whole = [parameter.grad.full_tensor() for parameter in model.parameters()]
    optimizer.step()
    row = optimizer.history[-1]
    norm, absmax = math.hypot(*(g.norm().item() for g in whole)), max(g.abs().max().item() for g in whole)
    if step < 2:
        assert math.isclose(row.norm, norm, rel_tol=1e-5) and math.isclose(row.absmax, absmax, rel_tol=1e-6)
        assert math.isclose(float(optimizer.grad_norm), norm, rel_tol=1e-5)
    else:
        assert math.isnan(row.norm) and math.isnan(optimizer.grad_norm)
    assert row.nonfinite == sum(int((~g.isfinite()).sum()) for g in whole), row
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_figures_under_fsdp2_are_the_whole_models(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
    assert all("done" in output for output in run_ranks(FSDP2, tmp_path))


def test_a_resumed_optimizer_goes_on_counting():
    model = Square()
    optimizer = ng.GuardedOptimizer(torch.optim.Adam(model.parameters()), model)
    for batch in BATCHES[:3]:
        model(batch)["loss"].backward()
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam(model.parameters())
    resumed = ng.GuardedOptimizer(plain, model)
    plain.load_state_dict(saved)  # also past the guard
    resumed.step()
    wrapped_later = ng.GuardedOptimizer(plain, model)
    wrapped_later.step()
    assert [record.step for record in optimizer.history] == [1, 2, 3]
    assert [record.step for record in resumed.history] == [4]
    assert [record.step for record in wrapped_later.history] == [5]
