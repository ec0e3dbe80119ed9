"""The callback of a Hugging Face Trainer without DeepSpeed: real weights, logs, stopping; test_contract.py has more."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch

import hallo_numguard as ng

import adapter_support as support
import deepspeed_support
import weights as minilm
from frameworks import hugging_face_trainer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("cpu_alone")


def test_figures_join_what_the_trainer_logs(tmp_path):
    faulty = support.Faulty("none", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, max_grad_norm=1e-3)
    guard = ng.attach(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [record.step for record in guard.history]
    for row, record in zip(rows, guard.history, strict=True):
        assert row["numguard/loss"] == pytest.approx(row["loss"], abs=1e-3)
        assert row["numguard/gradient_norm"] == record.norm == pytest.approx(row["grad_norm"])
    assert not any(name.startswith("numguard") for name in trainer.state.log_history[-1])  # the summary


def test_training_stops_as_callbacks_stop_it_and_the_report_is_kept(tmp_path):
    faulty = support.Faulty("weight", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path / "out", save_strategy="steps", save_steps=1)
    callback = ng.attach(trainer, ng.GuardConfig(dump_dir=tmp_path / "dump"))
    result = trainer.train()
    assert result.global_step == 3
    assert trainer.control.should_training_stop
    assert callback.stopped_by.report.first.name == faulty.model.trainable
    (file,) = (tmp_path / "dump").iterdir()
    assert json.loads(file.read_text())["verdict"] == "weights_nonfinite"
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2"]  # none of what is damaged


def test_an_epoch_that_ends_with_the_stop_is_not_saved_either(tmp_path):
    faulty = support.Faulty("weight", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, save_strategy="epoch", max_steps=-1, num_train_epochs=1)
    ng.attach(trainer)
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["numguard"]


def test_the_filter_that_hides_nan_losses_is_named(tmp_path, caplog):
    warned = {}
    for filtered in (True, False):
        caplog.clear()
        faulty = support.Faulty("forward", kind=support.WithLoss)
        trainer = hugging_face_trainer(faulty, tmp_path, logging_nan_inf_filter=filtered)
        ng.attach(trainer)
        with caplog.at_level(logging.WARNING, "hallo_numguard"):
            trainer.train()
        warned[filtered] = any("logging_nan_inf_filter" in record.getMessage() for record in caplog.records)
        row = next(row for row in trainer.state.log_history if row["step"] == 3)
        assert math.isfinite(row["loss"]) is filtered
        assert not math.isfinite(row["numguard/loss"])
    assert warned == {True: True, False: False}


def test_a_callback_guards_every_train_until_it_is_detached(tmp_path):
    faulty = support.Faulty("none", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, max_steps=2)
    guard = ng.attach(trainer)
    with pytest.raises(ng.InvalidInput, match="guarded already"):
        ng.attach(trainer)
    trainer.train()
    first = guard.history
    trainer.train()
    assert len(guard.history) == len(first)
    assert guard.history != first
    guard.detach()
    assert "log" not in vars(trainer)
    history = guard.history
    trainer.train()
    assert guard.history == history
    ng.attach(trainer).detach()


def test_attach_in_the_middle_of_training(tmp_path):
    guards = []

    class AttachesLate(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                guards.append(ng.attach(trainer))

    faulty = support.Faulty("none", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, max_steps=4)
    trainer.add_callback(AttachesLate())
    trainer.train()
    assert len(guards[0].history) == 2


def test_a_callback_without_a_trainer_says_so():
    arguments = transformers.TrainingArguments("out", use_cpu=True, report_to=[])
    with pytest.raises(ng.InvalidInput, match="callback of a transformers"):
        ng.integrations.NumGuardCallback().on_train_begin(arguments, transformers.TrainerState(), None)


def test_one_flipped_bit_of_a_real_file(tmp_path):
    """MiniLM in half precision, loaded from a file with one bit of an exponent flipped."""
    folder = shutil.copytree(minilm.model_folder(), tmp_path / "model")
    path = folder / "model.safetensors"
    begin, _ = minilm.place_of(path, minilm.QUERY)
    minilm.flip_bit(path, begin + (131 * 384 + 77) * 4, 30)
    body = transformers.AutoModel.from_pretrained(folder).half()

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, input_ids):
            return {"loss": self.body(input_ids).last_hidden_state.float().square().mean()}

    trainer = transformers.Trainer(
        model=Pooled(),
        args=transformers.TrainingArguments(str(tmp_path / "out"), max_steps=3, report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": torch.randint(100, 2000, (8,))} for _ in range(24)],
    )
    callback = ng.integrations.NumGuardCallback()
    trainer.add_callback(callback)
    trainer.train()
    report = callback.stopped_by.report
    assert (report.step, report.verdict) == (1, "weights_nonfinite")
    assert (report.first.name, report.first.index) == (f"body.{minilm.QUERY}", (131, 77))


RANKS = """
import os
import torch
import adapter_support as support
import deepspeed_support
from frameworks import hugging_face_trainer
import hallo_numguard as ng

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
faulty = support.Faulty("none", kind=support.WithLoss)
trainer = hugging_face_trainer(faulty, "OUT", max_steps=6, ddp_find_unused_parameters=False)
ng.inject(trainer, "parameter", faulty.model.frozen, index=(4, 2), step=3, rank=1)
guard = ng.attach(trainer)
trainer.train()
report = guard.stopped_by.report
assert trainer.state.global_step == 3
assert (report.verdict, report.first.name, report.first.index, report.first.rank) == (
    "weights_nonfinite", faulty.model.frozen, (4, 2), 1
), report
logged = [row for row in trainer.state.log_history if "numguard/loss" in row]
assert len(logged) == (3 if rank == 0 else 0), logged
torch.distributed.destroy_process_group()
print("done")
"""


def test_two_ranks_stop_together(tmp_path):
    for output in deepspeed_support.run_ranks(RANKS.replace("OUT", str(tmp_path / "out")), tmp_path):
        assert "done" in output
    written = sorted(path.name for path in (tmp_path / "out" / "numguard").iterdir())
    assert written == ["overflow-step00000003-rank0.json", "overflow-step00000003-rank1.json"]
