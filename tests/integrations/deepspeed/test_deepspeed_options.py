"""Whatever a configuration or a model does to where gradients lie, or when: the planted element is the one named."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections import OrderedDict, UserDict, defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import plant_in_gradient
from paths import IMPORTABLE


def zero(stage, **options):
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 500, **options}}


def bad_gradient(engine, name, index, step=0):
    handle = dict(engine.module.named_parameters())[name].register_hook(plant_in_gradient(index))
    support.train_step(engine, step)
    handle.remove()


@pytest.mark.parametrize("setup", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["hidden.weight", "norm.bias", "output.weight", "embedding.weight"])
def test_padding_between_parameters(attach, setup, name):
    engine = support.make_engine(setup, **zero(2, parameter_alignment=True))
    guard = attach(engine)
    bad_gradient(engine, name, (5, 3)[: 1 if name == "norm.bias" else 2])
    assert [one.name for one in guard.last_report.offenders] == [name]
    assert guard.last_report.offenders[0].index == (5, 3)[: len(guard.last_report.offenders[0].shape)]


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)])
def test_several_parameter_groups(attach, stage, offload):
    """As everybody has who exempts biases and norms from weight decay."""
    engine = support.make_engine("bf16", stage=stage, offload=offload, groups_of=decayed_or_not)
    guard = attach(engine)
    support.train_step(engine, 0)
    for step, (name, index) in enumerate([("norm.weight", (4,)), ("output.weight", (3, 20)), ("hidden.bias", (23,))]):
        bad_gradient(engine, name, index, step + 1)
        assert [(one.name, one.index) for one in guard.last_report.offenders] == [(name, index)]
        assert guard.history[-1].parameters[name].nonfinite == 1
    support.train_step(engine, 9)
    assert guard.history[-1].applied


def decayed_or_not(model):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for name, p in trained if p.dim() == 1 and "norm" in name], "weight_decay": 0.0, "lr": 1e-4},
        {"params": [p for name, p in trained if p.dim() == 1 and "norm" not in name], "weight_decay": 0.0},
    ]


class Normalised(nn.Module):
    """Batch normalisation: a bad sample poisons its running statistics in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_statistics_that_a_bad_sample_has_poisoned_are_not_the_cause_and_are_put_back(attach, stage):
    engine = support.make_engine("fp32", stage=stage, model=Normalised())
    guard = attach(engine)
    for step in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(support.DEVICE)
        if step == 2:
            x[1, 3] = float("nan")
        engine.backward(engine(x).square().mean())
        engine.step()
        if step == 2:
            report = guard.last_report
            assert bool(torch.isfinite(engine.module.norm.running_mean).all())
            assert guard.findings[-1].kind == "statistics_restored"
            assert report.verdict is ng.Verdict.INPUT_NONFINITE
            assert (report.first.name, report.first.index) == ("x", (1, 3))
            assert any("norm.running_mean" in line and "not shown to be the cause" in line for line in report.evidence)
    assert [record.applied for record in guard.history] == [True, True, False, True]


@pytest.mark.parametrize(("stage", "offload"), [(2, False), (2, True), (3, False)])
def test_the_micro_batch_that_was_bad_is_named(attach, stage, offload):
    engine = support.make_engine(
        "half" if stage == 2 else "fp16",
        stage=stage,
        offload=offload,
        model=nn.Linear(6, 3),
        gradient_accumulation_steps=3,
    )
    guard = attach(engine)
    for micro_step in range(6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(micro_step)).to(support.DEVICE, torch.half)
        if micro_step == 4:
            x[3, 0] = float("inf")
        engine.backward(engine(x).float().square().mean())
        engine.step()
    report = guard.last_report
    assert report.verdict is ng.Verdict.INPUT_NONFINITE
    assert (report.first.name, report.first.index) == ("input", (3, 0))
    assert any("micro-batch 1 of the step" in line for line in report.evidence)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch):
        return self.layer(batch["x"])


@pytest.mark.parametrize("kind", [BatchEncoding, UserDict, OrderedDict, partial(defaultdict, list)])
def test_batches_of_any_mapping_are_searched_and_keep_their_type(attach, kind):
    """A tokenizer's, for one, cannot be made anew from its items."""
    engine = support.make_engine("half", model=Mapped())
    guard = attach(engine)
    for step in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).to(support.DEVICE, torch.half)
        if step == 1:
            x[2, 1] = float("nan")
        engine.backward(engine(kind({"x": x})).float().square().mean())
        engine.step()
    assert [record.applied for record in guard.history] == [True, False, True]
    assert (guard.last_report.first.name, guard.last_report.first.index) == ("batch['x']", (2, 1))


LAUNCHED = """
import deepspeed_support as support, hallo_numguard as ng, torch, logging
import deepspeed
logging.disable(logging.CRITICAL)
support.allow_fp16()
deepspeed.init_distributed("gloo")
engine = support.make_engine("half")
guard = ng.attach(engine)
support.train_step(engine, 0)
support.plant(engine, "hidden.weight", (3, 4))
try:
    support.train_step(engine, 1)
except ng.NumericsError as error:
    first = error.report.first
    print(f"FOUND {first.name} {first.index} {first.rank} {error.report.world_size}")
"""


def test_the_launcher_of_deepspeed(tmp_path):
    """What its runner starts on each node. Scripts under torchrun: test_examples.py"""
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED)
    port = support.free_port()
    environment = {
        name: value for name, value in os.environ.items() if name not in support.rank_environment(0, 1, port)
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [IMPORTABLE, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    nodes = base64.urlsafe_b64encode(b'{"localhost": [0]}').decode()
    launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={nodes}", f"--master_port={port}"]
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FOUND hidden.weight (3, 4) 0 1" in done.stdout
