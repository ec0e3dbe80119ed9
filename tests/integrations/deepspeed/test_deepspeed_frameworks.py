"""attach() to what holds a DeepSpeed engine: an Accelerator, a Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support
from adapter_support import Faulty, WithLoss
from frameworks import hugging_face_trainer

pytest.importorskip("accelerate", reason="accelerate is not installed")


HALLO = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "fp16": {"enabled": False, "initial_scale_power": 8, "hysteresis": 1},
    "bf16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}


def test_an_accelerator_as_hallo_uses_it(alone):
    """Half-precision parameters with the fp16 block off; `backward` steps the engine from inside."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(HALLO)))
    torch.manual_seed(0)
    model = support.Model().half()
    with pytest.raises(ng.InvalidInput, match=r"after accelerator\.prepare"):
        ng.attach(accelerator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = ng.attach(accelerator)

    def step(number):
        tokens = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(number))
        loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(3):
        step(number)
    assert [record.applied for record in guard.history] == [True] * 3
    assert guard.history[-1].loss is not None
    support.plant(model, "norm.weight", (3,))
    with pytest.raises(ng.NumericsError) as caught:
        step(3)
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("norm.weight", (3,))
    guard.detach()


@pytest.fixture
def trainer(alone, tmp_path):
    config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    faulty = Faulty("none", kind=WithLoss)
    return hugging_face_trainer(faulty, tmp_path, use_cpu=False, deepspeed=config, max_steps=4, optim="adamw_torch")


def test_a_trainer_before_it_trains(trainer):
    guard = ng.attach(trainer)
    assert guard.history == []
    assert guard.last_report is None
    trainer.train()
    assert [record.step for record in guard.history] == [1, 2, 3, 4]
    assert all(record.applied for record in guard.history)
    guard.detach()
    assert len(guard.history) == 4


def test_a_trainer_whose_model_is_damaged(trainer, tmp_path):
    guard = ng.attach(trainer)
    with torch.no_grad():
        trainer.model.projection.weight[0, 5] = float("nan")
    with pytest.raises(ng.NumericsError) as caught:
        trainer.train()
    assert trainer.state.global_step == 1
    report = caught.value.report
    assert guard.stopped_by is caught.value
    assert report.step == 1
    assert (report.first.name, report.first.index) == ("projection.weight", (0, 5))
    assert [finding.offender.name for finding in guard.findings] == ["projection.weight"]
    (file,) = (tmp_path / "numguard").iterdir()
    assert ng.OverflowReport.from_json(file.read_text()).first == report.first
    guard.detach()


def test_a_trainer_that_is_given_the_callback(trainer):
    callback = ng.integrations.NumGuardCallback()
    trainer.add_callback(callback)
    ng.inject(trainer, "activation", "blocks.0", step=2)
    trainer.train()
    assert [record.applied for record in callback.history] == [True, False, True, True]
    assert (callback.last_report.verdict, callback.last_report.first.name) == ("forward_nonfinite", "blocks.0")
    assert callback.stopped_by is None


def test_a_trainers_loss_under_accumulation_is_what_it_logs(alone, tmp_path):
    config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    faulty = Faulty("none", kind=WithLoss)
    settings = {"deepspeed": config, "max_steps": 3, "optim": "adamw_torch", "logging_steps": 1}
    trainer = hugging_face_trainer(faulty, tmp_path, accumulate=2, use_cpu=False, **settings)
    guard = ng.attach(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [record.step for record in guard.history] == [row["step"] for row in rows] == [1, 2, 3]
    assert [record.loss for record in guard.history] == pytest.approx([row["loss"] for row in rows], rel=1e-3)
    assert guard.history[-1].norm == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
    guard.detach()
