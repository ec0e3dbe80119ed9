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


FEW = {"numguard/gradient_norm", "numguard/gradient_nonfinite", "numguard/skipped_in_a_row"}


def of_the_guard(row):
    return {name for name in row if name.startswith("numguard")}


@pytest.mark.parametrize(("log_figures", "expected"), [("few", FEW), ("none", set())])
def test_three_figures_join_what_the_trainer_logs(log_figures, expected, tmp_path):
    trainer = hugging_face_trainer(support.Faulty("none", kind=support.WithLoss), tmp_path)
    trainer.add_callback(ng.integrations.NumGuardCallback(log_figures=log_figures))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [of_the_guard(row) for row in rows] == [expected] * len(rows)
    with pytest.raises(ng.InvalidInput, match="log_figures must be"):
        ng.integrations.NumGuardCallback(log_figures="some")


def test_all_figures_join_what_the_trainer_logs_where_they_are_asked_for(tmp_path):
    faulty = support.Faulty("none", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, max_grad_norm=1e-3)
    guard = ng.integrations.NumGuardCallback(log_figures="all")
    trainer.add_callback(guard)
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
    ended = []

    class IsToldLast(transformers.TrainerCallback):
        def on_train_end(self, *_, **__):
            ended.append(True)

    trainer.add_callback(IsToldLast())
    with pytest.raises(ng.NumericsError) as caught:
        trainer.train()
    assert ended == [True]
    assert (trainer.state.global_step, trainer.is_in_train) == (3, False)
    assert trainer.control.should_training_stop
    assert caught.value is callback.stopped_by
    assert caught.value.report.first.name == faulty.model.trainable
    (file,) = (tmp_path / "dump").iterdir()
    assert json.loads(file.read_text())["verdict"] == "weights_nonfinite"
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2"]  # none of what is damaged


def test_an_epoch_that_ends_with_the_stop_is_not_saved_either(tmp_path):
    faulty = support.Faulty("weight", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path, save_strategy="epoch", max_steps=-1, num_train_epochs=1)
    ng.attach(trainer)
    with pytest.raises(ng.NumericsError):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["numguard"]


def test_a_run_that_is_to_return_does(tmp_path):
    trainer = hugging_face_trainer(support.Faulty("weight", kind=support.WithLoss), tmp_path)
    callback = ng.integrations.NumGuardCallback(on_stop="return")
    trainer.add_callback(callback)
    assert trainer.train().global_step == 3
    assert callback.stopped_by.report.verdict == "weights_nonfinite"
    with pytest.raises(ng.InvalidInput, match="on_stop must be"):
        ng.integrations.NumGuardCallback(on_stop="exit")


def test_a_run_that_raises_has_cleaned_up_first(tmp_path):
    faulty = support.Faulty("weight", kind=support.WithLoss)
    embedding = faulty.model.embedding
    faulty.model.get_input_embeddings = lambda: embedding
    trainer = hugging_face_trainer(faulty, tmp_path, neftune_noise_alpha=5.0)
    ng.attach(trainer)
    with pytest.raises(ng.NumericsError):
        trainer.train()
    assert not embedding._forward_hooks
    assert not {"_finalize_training", "_maybe_log_save_evaluate", "log"} & vars(trainer).keys()


class BadRate(torch.optim.lr_scheduler.LambdaLR):
    """A learning rate that is NaN in the third step alone: the update writes NaN, every gradient was finite."""

    def __init__(self, optimizer):
        super().__init__(optimizer, lambda step: float("nan") if step == 2 else 1.0)


def trainer_with_bad_rate(folder, **settings):
    faulty = support.Faulty("none", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, folder, **settings)
    trainer.optimizer = faulty.optimizer()
    trainer.lr_scheduler = BadRate(trainer.optimizer)
    return trainer, faulty.model


def nonfinite_in(folder):
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    return [name for name, tensor in saved.items() if name != "mask" and not tensor.isfinite().all()]


SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


def test_no_checkpoint_with_nan_replaces_a_finite_one(tmp_path):
    trainer, _ = trainer_with_bad_rate(tmp_path, **SAVES)
    saved = []

    class ReadsWhatIsSaved(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            saved.append(state.global_step)
            assert (tmp_path / f"checkpoint-{state.global_step}" / "trainer_state.json").exists()

    trainer.add_callback(ReadsWhatIsSaved())
    guard = ng.attach(trainer)
    with pytest.raises(ng.NumericsError, match=r"^The update of step 3 made embedding\.weight and \d+ more non-finite"):
        trainer.train()
    assert saved == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "numguard"]
    assert nonfinite_in(tmp_path / "checkpoint-2") == []
    report = guard.last_report
    assert report is guard.stopped_by.report
    assert (report.step, report.verdict, report.recoverable) == (3, "update_nonfinite", False)
    assert (report.first.name, report.first.index) == ("embedding.weight", (0, 0))
    assert "odd: lr is NaN" in report.evidence
    (file,) = (tmp_path / "numguard").iterdir()
    assert ng.OverflowReport.from_json(file.read_text()) == report


@pytest.mark.parametrize("on_stop", ["raise", "return"])
def test_a_stopped_run_is_not_saved_until_its_values_are_finite_again(on_stop, tmp_path):
    trainer, model = trainer_with_bad_rate(tmp_path)
    callback = ng.integrations.NumGuardCallback(on_stop=on_stop)
    trainer.add_callback(callback)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        trainer.train()
    except ng.NumericsError:
        assert on_stop == "raise"
    assert trainer.state.global_step == 3
    for _ in range(2):
        with pytest.raises(ng.NumericsError, match=r"^Trainer\.save_model was about to write") as caught:
            trainer.save_model(tmp_path / "final")
        assert caught.value.report.verdict is ng.Verdict.UPDATE_NONFINITE
    assert not (tmp_path / "final").exists()
    trained, trainer.model = trainer.model, support.WithLoss()
    trainer.save_model(tmp_path / "other")  # another model, and a finite one
    trainer.model = trained
    model.load_state_dict(before)
    trainer.save_model(tmp_path / "final")
    assert nonfinite_in(tmp_path / "final") == []
    with torch.no_grad():
        model.norm.weight[3] = float("inf")
    with pytest.raises(ng.NumericsError, match=r"parameter norm\.weight\[3\]: 1 \+Inf") as caught:
        trainer.save_model(tmp_path / "again")
    assert caught.value.report.verdict is ng.Verdict.WEIGHTS_NONFINITE  # other values than the update wrote
    callback.detach()
    assert not {"save_model", "_save_checkpoint"} & vars(trainer).keys()
    trainer.save_model(tmp_path / "again")
    assert nonfinite_in(tmp_path / "again") == ["norm.weight"]


def test_a_policy_that_warns_saves(tmp_path, caplog):
    trainer, _ = trainer_with_bad_rate(tmp_path, max_steps=3, **SAVES)
    guard = ng.attach(trainer, ng.GuardConfig(policy=ng.Policy(on_bad_save="warn", on_unrecoverable="warn")))
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        trainer.train()
    assert nonfinite_in(tmp_path / "checkpoint-3")
    (finding,) = guard.findings
    assert finding.message in caplog.text
    assert finding.message.startswith("Trainer._save_checkpoint was about to write")


def test_the_filter_that_hides_nan_losses_is_named(tmp_path, caplog):
    told = {}
    for filtered in (True, False):
        caplog.clear()
        faulty = support.Faulty("forward", kind=support.WithLoss)
        trainer = hugging_face_trainer(faulty, tmp_path, logging_nan_inf_filter=filtered)
        trainer.add_callback(ng.integrations.NumGuardCallback(log_figures="all"))
        with caplog.at_level(logging.INFO, "hallo_numguard"):
            trainer.train()
        told[filtered] = any("logging_nan_inf_filter" in record.getMessage() for record in caplog.records)
        row = next(row for row in trainer.state.log_history if row["step"] == 3)
        assert math.isfinite(row["loss"]) is filtered
        assert not math.isfinite(row["numguard/loss"])
    assert told == {True: True, False: False}


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
    with pytest.raises(ng.NumericsError) as caught:
        trainer.train()
    report = caught.value.report
    assert (report.step, report.verdict) == (1, "weights_nonfinite")
    assert (report.first.name, report.first.index) == (f"body.{minilm.QUERY}", (131, 77))
    with pytest.raises(ng.NumericsError, match="was about to write"):  # bad from the beginning, but a report blames it
        trainer.save_model(tmp_path / "final")


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
try:
    trainer.train()
    raise AssertionError("it returned")
except ng.NumericsError as error:
    report = error.report
assert trainer.state.global_step == 3
assert (report.verdict, report.first.name, report.first.index, report.first.rank) == (
    "weights_nonfinite", faulty.model.frozen, (4, 2), 1
), report
logged = [row for row in trainer.state.log_history if "numguard/gradient_norm" in row]
assert len(logged) == (3 if rank == 0 else 0), logged
torch.distributed.destroy_process_group()
print("done")
"""


def test_two_ranks_stop_together(tmp_path):
    for output in deepspeed_support.run_ranks(RANKS.replace("OUT", str(tmp_path / "out")), tmp_path):
        assert "done" in output
    first, second = sorted(path.name for path in (tmp_path / "out" / "numguard").iterdir())
    assert first.startswith("overflow-step00000003-rank0-20")
    assert second == first.replace("rank0", "rank1"), "of the same run"


SAVING_RANKS = """
import os
import torch
import transformers
import adapter_support as support
import deepspeed_support
from frameworks import hugging_face_trainer
import hallo_numguard as ng

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
faulty = support.Faulty("none", kind=support.WithLoss)
trainer = hugging_face_trainer(
    faulty, "OUT", max_steps=4, ddp_find_unused_parameters=False, save_strategy="steps", save_steps=2
)
guard = ng.attach(trainer)

class Damages(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if rank == 1 and state.global_step == 4:
            with torch.no_grad():
                faulty.model.norm.weight[3] = float("nan")

trainer.add_callback(Damages())
try:
    trainer.train()
    raise AssertionError("it returned")
except ng.NumericsError as error:
    first = error.report.first
    assert (first.name, first.index, first.rank, error.report.world_size) == ("norm.weight", (3,), 1, 2), first
if trainer.is_world_process_zero():  # on one rank alone, where all is finite: it waits for nobody
    trainer.save_model("OUT/final")
torch.distributed.destroy_process_group()
print("done")
"""


def test_a_weight_that_is_bad_on_one_rank_stops_both_at_the_checkpoint(tmp_path):
    for output in deepspeed_support.run_ranks(SAVING_RANKS.replace("OUT", str(tmp_path / "out")), tmp_path):
        assert "done" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "final", "numguard"]


LEAVING_RANKS = """
import os
import torch
import transformers
import adapter_support as support
import deepspeed_support
from frameworks import hugging_face_trainer
import hallo_numguard as ng

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
faulty = support.Faulty("none", kind=support.WithLoss)
settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
trainer = hugging_face_trainer(faulty, "OUT", max_steps=4, ddp_find_unused_parameters=False, **settings)
guard = ng.attach(trainer)

class Detaches(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2 + rank:
            guard.detach()

trainer.add_callback(Detaches())
trainer.train()
trainer.save_model("OUT/final")
assert "_save_checkpoint" not in vars(trainer)
torch.distributed.destroy_process_group()
print("done")
"""


def test_ranks_that_are_detached_one_after_the_other_do_not_wait_for_each_other(tmp_path):
    for output in deepspeed_support.run_ranks(LEAVING_RANKS.replace("OUT", str(tmp_path / "out")), tmp_path):
        assert "done" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "final"]


def test_a_trial_of_a_search_returns(tmp_path):
    faulty = support.Faulty("weight", kind=support.WithLoss)
    trainer = hugging_face_trainer(faulty, tmp_path)
    guard = ng.attach(trainer)
    assert trainer.train(trial={"learning_rate": 1e-3}).global_step == 3
    assert guard.stopped_by is not None
