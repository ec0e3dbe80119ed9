"""The callback of a Lightning Trainer: the campaign's faults, clipping, scalers, manual optimization, strategies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import adapter_support as support
import deepspeed_support

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
pytestmark = [
    pytest.mark.usefixtures("cpu_alone"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"
    ),
]


class Module(pl.LightningModule):
    """Calls its model as most do: not through its own forward."""

    def __init__(self, faulty, optimizer=torch.optim.AdamW):
        super().__init__()
        self.net = faulty.model
        self.faulty = faulty
        self.kind = optimizer

    def training_step(self, batch, batch_idx):
        (arguments, target) = batch
        loss = self.net.loss(self.net(*arguments), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = self.kind([item for item in self.parameters() if item.requires_grad], lr=1e-3)
        self.faulty.plant(optimizer, "net.")
        return optimizer

    def train_dataloader(self):
        steps = range(1, self.faulty.steps + 1)
        return torch.utils.data.DataLoader(steps, collate_fn=lambda items: self.faulty.batch(items[0]))


def trainer_of(faulty, *callbacks, **settings):
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**arguments, **settings})


def fit(faulty, *callbacks, module=None, **settings):
    """Trains; returns whether the guard has raised."""
    try:
        trainer_of(faulty, *callbacks, **settings).fit(module or Module(faulty))
    except ng.NumericsError:
        return True
    return False


def test_a_clean_run_in_bfloat16_throughout_has_the_same_bits():
    runs = []
    for guarded in (True, False):
        faulty = support.Faulty("none")
        batch = faulty.batch
        faulty.batch = lambda step, batch=batch: torch.utils._pytree.tree_map(
            lambda item: item.bfloat16() if item.is_floating_point() else item, batch(step)
        )
        callback = ng.integrations.LightningNumGuardCallback()
        fit(faulty, *[callback] * guarded, precision="bf16-true", max_steps=8)
        if guarded:
            assert [record.applied for record in callback.history] == [True] * 8
        runs.append(support.weights(faulty.model))
    support.assert_same_bits(*runs)


def scaled():
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, lambda *args, **kwargs: torch.optim.AdamW(*args, fused=True, **kwargs)]
)
def test_a_scaled_clean_run_has_the_same_bits(optimizer):
    runs = []
    for guarded in (True, False):
        faulty = support.Faulty("none")
        callback = ng.integrations.LightningNumGuardCallback()
        module = Module(faulty, optimizer)
        fit(faulty, *[callback] * guarded, module=module, plugins=[scaled()], max_steps=6, gradient_clip_val=None)
        runs.append(support.weights(faulty.model))
    support.assert_same_bits(*runs)


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self, faulty):
        super().__init__(faulty)
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


def test_optimizers_that_are_stepped_by_hand():
    faulty = support.Faulty("forward")
    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    assert not fit(faulty, callback, module=Manual(faulty), gradient_clip_val=None)
    applied = [record.applied for record in callback.history]
    assert applied == [True, True, False, True, True, True, *[True] * 6]
    report = faulty.reports[0]
    assert (report.verdict, report.first.kind) == (ng.Verdict.UNDETERMINED, "loss")  # nothing is run again
    assert all(torch.isfinite(item).all() for item in faulty.model.parameters())


@pytest.mark.parametrize("plugins", [[], [scaled()]], ids=["plain", "scaled"])
def test_a_bad_weight_of_an_optimizer_that_is_stepped_by_hand(plugins):
    faulty = support.Faulty("weight")
    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    assert fit(faulty, callback, module=Manual(faulty), gradient_clip_val=None, plugins=plugins)
    report = faulty.reports[0]
    assert (report.step, report.verdict) == (3, ng.Verdict.WEIGHTS_NONFINITE)
    assert report.first.name == f"net.{faulty.model.trainable}"


def test_attach_guards_every_fit_until_it_is_detached():
    faulty = support.Faulty("none")
    trainer = trainer_of(faulty, max_epochs=1)
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


@pytest.mark.parametrize("plugins", [[], [scaled()]], ids=["plain", "scaled"])
def test_a_run_goes_back_to_its_last_healthy_checkpoint(plugins, tmp_path):
    faulty = support.Faulty("weight")
    keeper = ng.CheckpointKeeper(tmp_path, healthy_after=1)

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 1:
                keeper.save({"module": module, "optimizer": trainer.optimizers[0]})

    config = ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback"))
    callback = ng.integrations.LightningNumGuardCallback(config)
    assert not fit(faulty, callback, Saves(), plugins=plugins)
    assert [record.applied for record in callback.history] == [True, True, False, True, True, True]
    assert all(torch.isfinite(item).all() for item in faulty.model.parameters())
    assert len({record.loss_scale for record in callback.history}) == 1


def test_detached_in_the_middle_it_looks_no_more():
    faulty = support.Faulty("forward")

    class Detaches(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                callback.detach()

    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    fit(faulty, callback, Detaches())
    assert len(callback.history) == 2
    assert not any(torch.isfinite(item).all() for item in faulty.model.blocks.parameters())  # as without a guard


def test_a_training_step_of_any_arguments():
    faulty = support.Faulty("forward")

    class Any(Module):
        def training_step(self, *args):
            return super().training_step(*args)

    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    fit(faulty, callback, module=Any(faulty))
    assert faulty.reports[0].verdict == ng.Verdict.FORWARD_NONFINITE


def test_a_guarded_optimizer_is_not_guarded_twice():
    faulty = support.Faulty("none")

    class Guarded(Module):
        def configure_optimizers(self):
            return ng.GuardedOptimizer(super().configure_optimizers(), self)

    with pytest.raises(ng.InvalidInput, match="guarded already"):
        trainer_of(faulty, ng.integrations.LightningNumGuardCallback(), gradient_clip_val=None).fit(Guarded(faulty))
    trainer_of(faulty, gradient_clip_val=None, max_steps=2).fit(Guarded(faulty))  # which alone is fine


def test_the_library_under_its_older_name():
    older = pytest.importorskip("pytorch_lightning", reason="the older package of Lightning is not installed")

    class Older(older.LightningModule):
        training_step, configure_optimizers, train_dataloader = (
            vars(Module)[name] for name in ("training_step", "configure_optimizers", "train_dataloader")
        )

        def __init__(self, faulty):
            super().__init__()
            self.net, self.faulty, self.kind = faulty.model, faulty, torch.optim.AdamW

    faulty = support.Faulty("forward")
    trainer = older.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    guard = ng.attach(trainer, None, faulty.reports.append)
    trainer.fit(Older(faulty))
    assert faulty.problems(guard, raised=False) == []


def test_a_batch_that_is_run_again_logs_nothing_twice():
    faulty = support.Faulty("forward")
    logged = []

    class Logs(Module):
        def log(self, name, value, **_):
            logged.append(name)

    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    fit(faulty, callback, module=Logs(faulty))
    assert faulty.reports[0].first.name == "net.blocks.1.mlp.0"  # found by running it again
    assert len(logged) == faulty.steps


ENGINE = """
import deepspeed_support
import torch
import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
import adapter_support as support
import test_lightning as harness
import hallo_numguard as ng

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

def run(fault, guarded):
    faulty = harness.Faulty(fault)
    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    strategy = OnCpu(config=dict(config), process_group_backend="gloo")
    settings = {"devices": 1, "max_steps": 6, "gradient_clip_val": None}
    raised = harness.fit(faulty, *[callback] * guarded, strategy=strategy, **settings)
    return faulty, callback, raised, support.weights(faulty.model)

_, callback, _, guarded = run("none", True)
assert [record.applied for record in callback.history] == [True] * 6
_, _, _, plain = run("none", False)
support.assert_same_bits(guarded, plain)
faulty, callback, raised, _ = run("weight", True)
assert raised
report = callback.last_report
assert (report.verdict, report.first.name) == ("weights_nonfinite", "net." + faulty.model.trainable), report
faulty, callback, raised, _ = run("forward", True)
report = callback.last_report
assert not raised
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
    faulty = support.Faulty("none")
    assert not any(type(item).__module__.startswith("hallo_numguard") for item in trainer_of(faulty).callbacks)


RANKS = """
import sys
import torch
import lightning.pytorch as pl
import adapter_support as support
import test_lightning as harness
import hallo_numguard as ng

rank, sharded = int(__import__("os").environ["RANK"]), "SHARDED" == "fsdp2"
torch.set_num_threads(1)
INPUT = support.INPUT["transformer"][1]

class Faulty(support.Faulty):
    def batch(self, step):
        arguments, target = super().batch(step + 100 * rank)
        if self.fault == "input" and step == 3 and rank == 1:
            arguments[1][INPUT] = float("nan")
        return arguments, target

class Module(harness.Module):
    def __init__(self, faulty):
        super().__init__(faulty)
        if sharded:
            self.net.head = torch.nn.Linear(16, 16, bias=False)

    def configure_model(self):
        if sharded:
            from torch.distributed.fsdp import FSDPModule, fully_shard
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

def run(fault, guarded):
    faulty = Faulty(fault)
    callback = ng.integrations.LightningNumGuardCallback(None, faulty.reports.append)
    strategy = pl.strategies.ModelParallelStrategy(2, 1) if sharded else "ddp"
    clip = None if sharded else 1.0
    harness.fit(faulty, *[callback] * guarded, module=Module(faulty), strategy=strategy, devices=2, max_steps=5,
        gradient_clip_val=clip, use_distributed_sampler=False)
    return faulty, callback, [getattr(p, "_local_tensor", p).detach().clone() for p in faulty.model.parameters()]

_, callback, guarded = run("none", True)
assert [record.applied for record in callback.history] == [True] * 5
_, _, plain = run("none", False)
assert all(torch.equal(a, b) for a, b in zip(guarded, plain, strict=True))
faulty, callback, _ = run("input", True)
assert [record.applied for record in callback.history] == [True, True, False, True, True]
report = faulty.reports[0]
first = report.first
assert report.verdict == "input_nonfinite", report
assert (first.name, first.index, first.rank) == ("batch[0][1]", INPUT, 1), report
print("done")
"""


@pytest.mark.parametrize("sharded", ["ddp", "fsdp2"])
def test_two_ranks(sharded, tmp_path):
    for output in deepspeed_support.run_ranks(RANKS.replace("SHARDED", sharded), tmp_path):
        assert "done" in output
