"""Every line of README's table "I use ...", taken from there and run: a weight goes bad, and the guard names it."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support
from adapter_support import Faulty, WithLoss
from frameworks import hugging_face_trainer, lightning_module, lightning_trainer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BAD = 2  # step in which the weight goes bad
pytestmark = pytest.mark.usefixtures("cpu_alone")


def rows():
    """What is used, and the line, of each entry of each row."""
    section = README.split("## I use ...")[1].split("\n## ")[0]
    found = re.findall(r"^\| ([^|`]+) \| `([^`]+)`[^|]* \| .*\|$", section, re.MULTILINE)
    assert len(found) == section.count("\n| ") - 1, "the head is no such row"
    return [(used, line) for cell, line in found for used in cell.split(", ")]


class Net(nn.Module):
    """What all of them train."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()


def loop(model, optimizer, scaler=None, backward=None):
    """Three steps, as scripts have them."""
    with contextlib.suppress(ng.NumericsError):
        for _ in range(3):
            loss = model(torch.randn(4, 8))
            (backward or torch.Tensor.backward)(loss if scaler is None else scaler.scale(loss))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()


class Plain:
    """One that uses plain PyTorch: what stands before the line, and what comes after it.

    Attributes:
        weight: Name of the weight that goes bad.
    """

    weight = "first.weight"

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        model = self.wrapped(Net())
        self.names = {"ng": ng, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}

    def wrapped(self, model):
        return model

    def train(self):
        """Returns the guard."""
        self.plant(self.names["model"])
        loop(self.names["model"], self.names["optimizer"])
        return self.names["optimizer"]

    def plant(self, target):
        ng.inject(target, "parameter", self.weight, index=(3, 5), step=BAD)

    def check(self, guard):
        report = guard.last_report
        assert (report.step, report.verdict) == (BAD, ng.Verdict.WEIGHTS_NONFINITE)
        assert (report.first.name.removeprefix("net."), report.first.index) == (self.weight, (3, 5))
        assert [record.applied for record in guard.history] == [True, False]


class Compiled(Plain):
    def wrapped(self, model):
        return torch.compile(model, backend="eager")

    def plant(self, target):
        super().plant(target._orig_mod)

    def train(self):
        loop(self.names["model"], self.names["optimizer"], backward=self._backward)
        return self.names["optimizer"]

    def _backward(self, loss):
        loss.backward()
        with torch.no_grad():
            self.names["model"]._orig_mod.first.weight[3, 5] = float("nan")


class Scaled(Plain):
    def train(self):
        self.plant(self.names["model"])
        loop(self.names["model"], self.names["optimizer"], torch.amp.GradScaler("cpu", init_scale=8.0))
        return self.names["optimizer"]


def one_rank():
    if not torch.distributed.is_initialized():
        address = f"tcp://127.0.0.1:{deepspeed_support.free_port()}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


class Replicated(Plain):
    def wrapped(self, model):
        one_rank()
        return nn.parallel.DistributedDataParallel(model)


class Sharded(Plain):
    def wrapped(self, model):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=one_rank())

    def plant(self, target):
        """A slice of a DTensor is damaged, as a shard of a file would be."""
        passes = []

        def damage(*_):
            passes.append(1)
            if len(passes) == BAD:
                with torch.no_grad():
                    target.first.weight.to_local()[3, 5] = float("nan")

        target.register_forward_pre_hook(damage, prepend=True)


class DeepSpeed(Plain):
    def __init__(self, folder):
        engine = deepspeed_support.make_engine("fp32", stage=2, model=Net())
        self.names = {"ng": ng, "engine": engine}

    def train(self):
        engine = self.names["engine"]
        self.plant(engine)
        with contextlib.suppress(ng.NumericsError):
            for _ in range(3):
                engine.backward(engine(torch.randn(4, 8)))
                engine.step()
        return self.names["guard"]


class Accelerated(Plain):
    def __init__(self, folder):
        from accelerate import Accelerator

        accelerator = Accelerator(**self.settings())
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.names = {"ng": ng, "accelerator": accelerator}
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def settings(self):
        return {"cpu": True}

    def train(self):
        self.plant(self.model)
        loop(self.model, self.optimizer, backward=self.names["accelerator"].backward)
        return self.names["guard"]


class AcceleratedDeepSpeed(Accelerated):
    def settings(self):
        from accelerate.utils import DeepSpeedPlugin

        deepspeed_support.single_process_environment()
        deepspeed_support.allow_fp16()
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config={**config, "zero_allow_untested_optimizer": True})}


class HuggingFace(Plain):
    weight = "projection.weight"

    def __init__(self, folder, **settings):
        trainer = hugging_face_trainer(Faulty("none", kind=WithLoss), folder, max_steps=3, **settings)
        self.names = {"ng": ng, "trainer": trainer}

    def train(self):
        trainer = self.names["trainer"]
        self.plant(trainer)
        with contextlib.suppress(ng.NumericsError):
            trainer.train()
        assert trainer.control.should_training_stop
        return self.names.get("guard") or trainer.callback_handler.callbacks[-1]


class HuggingFaceDeepSpeed(HuggingFace):
    def __init__(self, folder):
        deepspeed_support.single_process_environment()
        deepspeed_support.allow_fp16()
        config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
        super().__init__(folder, use_cpu=False, deepspeed=config)


class Lightning(Plain):
    weight = "projection.weight"

    def __init__(self, folder):
        import lightning.pytorch as pl

        self.module = lightning_module(pl)(Faulty("none"))
        trainer = functools.partial(lightning_trainer, pl)
        self.names = {"ng": ng, "Trainer": trainer, "trainer": trainer()}

    def train(self):
        trainer = self.names["trainer"]
        self.plant(self.module.net)
        with contextlib.suppress(ng.NumericsError):
            trainer.fit(self.module)
        (guard,) = (item for item in trainer.callbacks if type(item).__name__ == "NumGuardCallback")
        assert guard is self.names.get("guard", guard)
        return guard


class Tracked(Plain):
    """Trackers: the configuration is made by the line, and its run has the figures."""

    def train(self):
        self.names["optimizer"] = ng.GuardedOptimizer(
            self.names["optimizer"], self.names["model"], self.names["config"]
        )
        guard = super().train()
        guard.detach()
        self.finish()
        return guard

    def finish(self):
        lines = Path("figures.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", "1", "2"]


class TensorBoard(Tracked):
    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder)
        self.names["writer"] = SummaryWriter(str(folder))

    def finish(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.names["writer"].close()
        events = EventAccumulator(str(self.folder)).Reload().Scalars("numguard/gradient_nonfinite")
        assert [event.step for event in events] == [1, 2]


class Wandb(Tracked):
    def __init__(self, folder):
        import wandb

        super().__init__(folder)
        self.run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(console="off", silent=True))

    def finish(self):
        assert "first.weight" in self.run.summary["numguard/report"]
        self.run.finish()


class Mlflow(Tracked):
    def __init__(self, folder):
        import mlflow

        super().__init__(folder)
        self.before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.create_experiment("test", artifact_location=str(folder / "artifacts"))
        mlflow.set_experiment("test")
        self.run = mlflow.start_run()

    def finish(self):
        import mlflow

        mlflow.end_run()
        mlflow.flush_async_logging()
        history = mlflow.MlflowClient().get_metric_history(self.run.info.run_id, "numguard/gradient_nonfinite")
        assert [metric.step for metric in history] == [1, 2]
        mlflow.set_tracking_uri(self.before)


USERS = {
    "plain PyTorch": Plain,
    "torch.compile": Compiled,
    "torch.amp.GradScaler": Scaled,
    "DistributedDataParallel": Replicated,
    "FSDP2": Sharded,
    "clipping": Plain,
    "DeepSpeed": DeepSpeed,
    "Accelerate": Accelerated,
    "Accelerate with DeepSpeed": AcceleratedDeepSpeed,
    "Hugging Face Trainer": HuggingFace,
    "Hugging Face Trainer with DeepSpeed": HuggingFaceDeepSpeed,
    "Lightning": Lightning,
    "a Lightning Trainer made elsewhere": Lightning,
    "TensorBoard": TensorBoard,
    "Weights & Biases": Wandb,
    "MLflow": Mlflow,
    "a CSV file": Tracked,
}


def test_every_row_is_run():
    assert [used for used, _ in rows()] == list(USERS)


@pytest.mark.parametrize(("used", "line"), rows(), ids=[used for used, _ in rows()])
def test_a_line(used, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    user = USERS[used](tmp_path)
    exec(line, user.names)
    guard = user.train()
    user.check(guard)
    guard.detach()
