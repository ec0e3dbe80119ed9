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
    assert (report.step, report.verdict) == (3, ng.Verdict.WEIGHTS_NONFINITE)
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


ENGINE = """
import deepspeed_support
import torch
import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
import adapter_support as support
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
faulty, outcome = run("forward")
report = outcome.guard.last_report
assert not outcome.raised
assert (report.verdict, report.first.name) == ("forward_nonfinite", "net." + faulty.model.module), report
print("done")
"""


def test_an_engine_of_deepspeed(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    (output,) = deepspeed_support.run_ranks(ENGINE, tmp_path, ranks=1)
    assert "done" in output


def test_installing_registers_nothing_with_lightning():
    from importlib.metadata import entry_points

    offered = entry_points(group="lightning.pytorch.callbacks_factory")
    assert not any(point.value.startswith("hallo_numguard") for point in offered)
    assert not any(type(item).__module__.startswith("hallo_numguard") for item in lightning_trainer(pl).callbacks)
