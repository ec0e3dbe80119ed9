"""The callback of a Lightning Trainer: manual optimization, DeepSpeed, its older name; see also test_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import adapter_support as support
import deepspeed_support
from frameworks import FRAMEWORKS, lightning_module, lightning_trainer

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
pytestmark = [
    pytest.mark.usefixtures("cpu_alone"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
]


LIGHTNING = FRAMEWORKS["lightning"]
Module = lightning_module(pl)


def test_a_clean_run_in_bfloat16_throughout_has_the_same_bits(tmp_path):
    runs = []
    for guarded in (True, False):
        faulty = LIGHTNING.faulty("none")
        settings = {"precision": "bf16-true", "max_steps": 8}
        run = LIGHTNING.train(faulty, tmp_path, guarded, settings=settings)
        if guarded:
            assert [record.applied for record in run.guard.history] == [True] * 8
        runs.append(support.weights(faulty.model))
    support.assert_same_bits(*runs)


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self, *options):
        super().__init__(*options)
        self.automatic_optimization = False
        self.other = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        (arguments, target) = batch
        first.zero_grad()
        self.manual_backward(self.net.loss(self.net(*arguments), target))
        first.step()
        second.zero_grad()
        self.manual_backward(self.other(torch.ones(2, 4)).square().mean())
        second.step()

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.SGD(self.other.parameters(), lr=0.1)


def test_optimizers_that_are_stepped_by_hand(tmp_path):
    faulty = support.Faulty("forward")
    run = LIGHTNING.train(faulty, tmp_path, module=Manual, clip=None)
    assert not run.raised
    applied = [record.applied for record in run.guard.history]
    assert applied == [True, True, False, True, True, True, *[True] * 6]
    report = faulty.reports[0]
    assert (report.verdict, report.first.kind) == (ng.Verdict.UNDETERMINED, "loss")  # nothing is run again
    assert all(torch.isfinite(item).all() for item in faulty.model.parameters())


@pytest.mark.parametrize("scale", [None, 2.0**8])
def test_a_bad_weight_of_an_optimizer_that_is_stepped_by_hand(scale, tmp_path):
    faulty = support.Faulty("weight")
    assert LIGHTNING.train(faulty, tmp_path, module=Manual, clip=None, scale=scale).raised
    report = faulty.reports[0]
    # Lightning's global_step counts the steps of both: this is the third of the first optimizer.
    assert (report.step, report.verdict) == (5, ng.Verdict.WEIGHTS_NONFINITE)
    assert report.first.name == f"net.{faulty.model.trainable}"


def test_attach_guards_every_fit_until_it_is_detached():
    faulty = support.Faulty("none")
    trainer = lightning_trainer(pl)
    guard = ng.attach(trainer)
    with pytest.raises(ng.InvalidInput, match="NumGuardCallback already"):
        ng.attach(trainer)
    module = Module(faulty)
    trainer.fit(module)
    assert len(guard.history) == faulty.steps
    assert "training_step" not in vars(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert len(guard.history) == faulty.steps
    guard.detach()
    trainer.fit_loop.max_epochs = 3
    history = guard.history
    trainer.fit(module)
    assert guard.history == history


def test_nothing_is_guarded_after_a_detach_in_the_middle(tmp_path):
    faulty = support.Faulty("forward")

    class Detaches(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.callbacks[0].detach()

    run = LIGHTNING.train(faulty, tmp_path, callbacks=[Detaches()])
    assert len(run.guard.history) == 2
    assert not any(torch.isfinite(item).all() for item in faulty.model.blocks.parameters())  # as without a guard


def test_a_training_step_of_any_arguments(tmp_path):
    faulty = support.Faulty("forward")

    class Any(Module):
        def training_step(self, *args):
            return super().training_step(*args)

    LIGHTNING.train(faulty, tmp_path, module=Any)
    assert faulty.reports[0].verdict == ng.Verdict.FORWARD_NONFINITE


def test_a_guarded_optimizer_is_not_guarded_twice():
    faulty = support.Faulty("none")

    class Guarded(Module):
        def configure_optimizers(self):
            return ng.GuardedOptimizer(super().configure_optimizers(), self)

    with pytest.raises(ng.InvalidInput, match="guarded already"):
        lightning_trainer(pl, [ng.integrations.LightningNumGuardCallback()]).fit(Guarded(faulty))
    lightning_trainer(pl, max_steps=2).fit(Guarded(faulty))  # which alone is fine


def test_the_library_under_its_older_name():
    older = pytest.importorskip("pytorch_lightning", reason="the older package of Lightning is not installed")

    faulty = support.Faulty("forward")
    trainer = lightning_trainer(older)
    guard = ng.attach(trainer, None, faulty.reports.append)
    trainer.fit(lightning_module(older)(faulty))
    assert faulty.problems(guard, raised=False) == []


def test_a_batch_that_is_run_again_logs_nothing_twice(tmp_path):
    faulty = support.Faulty("forward")
    logged = []

    class Logs(Module):
        def log(self, name, value, **_):
            logged.append(name)

    LIGHTNING.train(faulty, tmp_path, module=Logs)
    assert faulty.reports[0].first.name == "net.blocks.1.mlp.0"  # found by running it again
    assert len(logged) == faulty.steps


def nonfinite_in(path):
    saved = torch.load(path, weights_only=False)["state_dict"]
    return [name for name, tensor in saved.items() if name != "net.mask" and not tensor.isfinite().all()]


class BadRate(Module):
    """The learning rate of the third step is NaN: its update writes NaN, every gradient was finite."""

    def training_step(self, batch, batch_idx):
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = float("nan") if batch_idx == 2 else 1e-3
        return super().training_step(batch, batch_idx)


def test_no_checkpoint_with_nan_replaces_a_finite_one_and_a_stopped_run_is_not_saved(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

    callbacks = [
        guard := ng.integrations.LightningNumGuardCallback(),
        OnExceptionCheckpoint(tmp_path / "exception"),
        ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=1),
    ]
    trainer = lightning_trainer(pl, callbacks, enable_checkpointing=True)
    module = BadRate(support.Faulty("none"))
    with pytest.raises(ng.NumericsError, match=r"^Trainer\.save_checkpoint was about to write") as caught:
        trainer.fit(module)
    assert (caught.value.report.step, caught.value.report.first.name) == (3, "net.embedding.weight")
    (kept,) = (tmp_path / "kept").iterdir()
    assert "step=2" in kept.name
    assert nonfinite_in(kept) == []
    assert not (tmp_path / "exception").exists()
    with pytest.raises(ng.NumericsError):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()
    guard.detach()
    trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert "save_checkpoint" not in vars(trainer)


def test_weights_that_are_saved_alone_need_no_finite_state(tmp_path):
    module = Module(support.Faulty("none"))
    trainer = lightning_trainer(pl, max_steps=2)
    guard = ng.attach(trainer)
    trainer.fit(module)
    trainer.optimizers[0].state[module.net.norm.bias]["exp_avg"][3] = float("nan")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ng.NumericsError) as caught:
        trainer.save_checkpoint(tmp_path / "all.ckpt")
    first = caught.value.report.first
    assert (first.kind, first.name, first.index) == ("optimizer_state", "net.norm.bias", (3,))
    guard.detach()


SAVING_RANKS = """
import os
import torch
import lightning.pytorch as pl
import adapter_support as support
import hallo_numguard as ng
from frameworks import lightning_module, lightning_trainer

rank = int(os.environ["RANK"])
module = lightning_module(pl)(support.Faulty("none", ranks=2))
guard = ng.integrations.LightningNumGuardCallback()

class Damages(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if rank == 1 and trainer.global_step == 2:
            module.net.norm.weight.data[3] = float("nan")

callbacks = [guard, Damages(), pl.callbacks.ModelCheckpoint("OUT", every_n_train_steps=1, save_top_k=1)]
trainer = lightning_trainer(
    pl, callbacks, enable_checkpointing=True, strategy="ddp", devices=2, use_distributed_sampler=False
)
try:
    trainer.fit(module)
    raise AssertionError("it returned")
except ng.NumericsError as error:
    first = error.report.first
    assert (first.name, first.rank, error.report.world_size) == ("net.norm.weight", 1, 2), first
print("done")
"""


SHARDED = """
import os
import torch
import lightning.pytorch as pl
import hallo_numguard as ng
from frameworks import FRAMEWORKS

class Saves(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 2 and os.environ["RANK"] == "1":
            with torch.no_grad():
                module.net.norm.weight.to_local()[3] = float("nan")
        trainer.save_checkpoint(f"OUT/{trainer.global_step}")

lightning = FRAMEWORKS["lightning"]
run = lightning.train(lightning.faulty("none", ranks=2), None, parallel="fsdp2", callbacks=[Saves()])
assert run.raised
first = run.guard.last_report.first
assert (first.name, first.index, first.rank) == ("net.norm.weight", (11,), 1), first
print("done")
"""


def test_a_slice_that_is_bad_on_one_rank_stops_both(tmp_path):
    out = tmp_path / "out"
    for output in deepspeed_support.run_ranks(SHARDED.replace("OUT", str(out)), tmp_path):
        assert "done" in output
    assert [path.name for path in out.iterdir()] == ["1"]


def test_a_weight_that_is_bad_on_one_rank_stops_both_at_the_checkpoint(tmp_path):
    out = tmp_path / "out"
    for output in deepspeed_support.run_ranks(SAVING_RANKS.replace("OUT", str(out)), tmp_path):
        assert "done" in output
    (kept,) = out.iterdir()
    assert nonfinite_in(kept) == []


ENGINE = """
import deepspeed_support
import torch
import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
import adapter_support as support
import hallo_numguard as ng
from frameworks import FRAMEWORKS

LIGHTNING = FRAMEWORKS["lightning"]
deepspeed_support.allow_fp16()

class OnCpu(DeepSpeedStrategy):  # which insists on a GPU
    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
config["zero_force_ds_cpu_optimizer"] = False

def run(fault, guarded=True):
    faulty = support.Faulty(fault)
    strategy = OnCpu(config=dict(config), process_group_backend="gloo")
    outcome = LIGHTNING.train(faulty, None, guarded, clip=None, settings={"strategy": strategy, "max_steps": 6})
    return faulty, outcome

(guarded, outcome), (plain, _) = run("none"), run("none", False)
assert [record.applied for record in outcome.guard.history] == [True] * 6
support.assert_same_bits(support.weights(guarded.model), support.weights(plain.model))
faulty, outcome = run("weight")
report = outcome.guard.last_report
assert outcome.raised
assert (report.verdict, report.first.name) == ("weights_nonfinite", "net." + faulty.model.trainable), report
trainer = outcome.guard._saving_trainer
try:
    trainer.save_checkpoint("OUT")
    raise AssertionError("saved")
except ng.NumericsError as error:
    assert str(error).startswith("Trainer.save_checkpoint was about to write"), error
faulty, outcome = run("forward")
report = outcome.guard.last_report
assert not outcome.raised
assert (report.verdict, report.first.name) == ("forward_nonfinite", "net." + faulty.model.module), report
print("done")
"""


def test_an_engine_of_deepspeed(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (output,) = deepspeed_support.run_ranks(ENGINE.replace("OUT", str(tmp_path / "out")), tmp_path, ranks=1)
    assert "done" in output


def test_installing_registers_nothing_with_lightning():
    from importlib.metadata import entry_points

    offered = entry_points(group="lightning.pytorch.callbacks_factory")
    assert not any(point.value.startswith("hallo_numguard") for point in offered)
    assert not any(type(item).__module__.startswith("hallo_numguard") for item in lightning_trainer(pl).callbacks)
