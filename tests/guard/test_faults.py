"""The faults that people meet are named: by a trace alone, through DeepSpeed, and from a bundle in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support
import faulty
import fork_server
from faulty import FAULTS, STAGES, Faulty, damage, train
from paths import IMPORTABLE

pytestmark = pytest.mark.deepspeed

VERDICTS = {"forward": "forward_nonfinite", "backward": "backward_nonfinite"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_trace_alone_names_it(fault, dtype):
    torch.manual_seed(0)
    model = Faulty().to(dtype)
    damage(model, fault)
    with ng.trace(model, operations=True) as tr:
        model(faulty.tokens()).float().square().mean().backward()
    found = tr.first_nonfinite
    _, name, phase = FAULTS[fault]
    assert (found.name, found.phase) == (name, phase)
    if found.kind == "activation":
        assert "faulty.py:" in found.operation


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_guarded_run_names_it_and_a_bundle_reproduces_it(fault, kind, tmp_path):
    setup, stage = kind
    _, name, phase = FAULTS[fault]
    engine = support.make_engine(setup, scale_power=4, stage=stage, model=Faulty().to(half(setup)))
    config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"), repro_dir=tmp_path)
    guard = ng.attach(engine, config)
    train(engine, 0)
    assert guard.last_report is None
    damage(engine, fault)
    train(engine, 1)
    report = guard.last_report
    guard.detach()
    expected = "weights_nonfinite" if fault == "embedding row" else VERDICTS[phase]
    assert (report.verdict, report.first.name) == (expected, name), str(report)
    (bundle,) = tmp_path.iterdir()
    assert bundle.name.startswith("repro-step00000002-rank0-")
    about = json.loads((bundle / "bundle.json").read_text())
    assert about["why_no_call"] == ""
    assert json.loads((bundle / "config.json").read_text())["zero_optimization"]["stage"] == stage
    assert ng.OverflowReport.from_json((bundle / "report.json").read_text()) == report
    if kind in (("fp16", 3), ("fp16", 0)):  # a process each, and they differ in how weights were taken
        done = run_bundle(bundle, python=[sys.executable] if fault == "embedding row" else None)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"module {name.removesuffix('.weight')}, a " in done.stdout
        assert done.stdout.splitlines()[-1].startswith("reproduced: ")
        assert ("finite values became non-finite" in done.stdout) == (fault != "embedding row")


def half(setup):
    return torch.bfloat16 if setup == "bf16" else torch.float16


def run_bundle(bundle, *arguments, path=IMPORTABLE, python=None):
    """Runs its script where neither DeepSpeed nor this package can be imported; in a fresh process, if told which."""
    blocked = "import sys; sys.modules['deepspeed'] = sys.modules['hallo_numguard'] = None; import runpy; "
    script = str(bundle / "reproduce.py")
    code = f"{blocked}sys.argv = {[script, *arguments]!r}; runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.run(
        [*(python or fork_server.command()), "-c", code],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=bundle.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


RANKS = """
import json, os, sys
import torch
import deepspeed_support as support
import faulty
from pathlib import Path
import hallo_numguard as ng

folder = Path(sys.argv[0]).parent
for setup, stage in faulty.STAGES[:3]:
    for fault, (_, name, phase) in faulty.FAULTS.items():
        engine = support.make_engine(setup, scale_power=4, stage=stage, model=faulty.Faulty().half())
        config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"), repro_dir=folder / f"{stage}-{fault}")
        guard = ng.attach(engine, config)
        faulty.train(engine, 0)
        faulty.damage(engine, fault)
        faulty.train(engine, 1)
        report = guard.last_report
        guard.detach()
        print("found", json.dumps([stage, fault, report.verdict, report.first.name]))
"""


def test_two_ranks_name_it_and_write_one_bundle(tmp_path):
    outputs = support.run_ranks(RANKS, tmp_path)
    for output in outputs:
        found = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("found ")]
        assert [tuple(item) for item in found] == [
            (stage, fault, "weights_nonfinite" if fault == "embedding row" else VERDICTS[phase], name)
            for _, stage in STAGES[:3]
            for fault, (_, name, phase) in FAULTS.items()
        ]
    for _, stage in STAGES[:3]:
        for fault in FAULTS:
            (bundle,) = (tmp_path / f"{stage}-{fault}").iterdir()
            assert (bundle / "call.pt").exists(), (bundle / "bundle.json").read_text()
    done = run_bundle(next((tmp_path / "3-log").iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr


TRAINING_SCRIPT = """
import sys
import torch
import deepspeed_support as support
import faulty

class Own(torch.nn.Module):  # what a training script defines itself is pickled as __main__.Own
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(faulty.WIDTH, faulty.WIDTH)
        self.negative = True

    def forward(self, x):
        return torch.log(-self.project(x).abs() - 1) if self.negative else x

def build():
    torch.manual_seed(0)
    model = faulty.Faulty()
    model.gate = Own()
    return model.bfloat16()

if __name__ == "__main__":
    import hallo_numguard as ng
    engine = support.make_engine("bf16", stage=2, model=build())
    guard = ng.attach(engine, ng.GuardConfig(repro_dir="repro"))
    faulty.train(engine, 0)
    faulty.train(engine, 1)
"""


def test_a_bundle_finds_classes_of_the_training_script_and_runs_the_whole_model(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING_SCRIPT)
    alone = support.rank_environment(0, 1, support.free_port())
    environment = {**os.environ, **alone, "PYTHONPATH": IMPORTABLE}
    done = subprocess.run(
        [*fork_server.command(), str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "repro").iterdir())
    plain = [*fork_server.command(), str(first / "reproduce.py")]
    again = subprocess.run(plain, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "a Own\n" in again.stdout
    whole = [*fork_server.command(), str(second / "reproduce.py"), "--model", "training:build"]
    again = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.splitlines()[-1] == "reproduced: gate was given finite values and made others"
    missing = subprocess.run(plain, env={**environment, "PYTHONPATH": ""}, capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "could not be tried" in missing.stdout
    assert "Traceback" not in missing.stderr


def test_an_overflow_that_settles_leaves_no_bundle(tmp_path):
    engine = support.make_engine("fp16", scale_power=30)
    guard = ng.attach(engine, ng.GuardConfig(repro_dir=tmp_path))
    support.train_step(engine)
    assert guard.last_report.verdict == "scale_too_high"
    guard.detach()
    assert not list(tmp_path.iterdir())


def test_a_bad_batch_is_kept_without_a_module(tmp_path):
    engine = support.make_engine("bf16", model=torch.nn.Linear(4, 2).bfloat16())
    guard = ng.attach(engine, ng.GuardConfig(repro_dir=tmp_path))
    x = torch.randn(4, 4).bfloat16()
    x[2, 1] = float("inf")
    engine.backward(engine(x).float().square().mean())
    engine.step()
    guard.detach()
    (bundle,) = tmp_path.iterdir()
    assert torch.equal(torch.load(bundle / "batch.pt")["args"][0], x)
    done = run_bundle(bundle)
    assert done.returncode == 2
    assert "no module is to blame" in done.stdout


class Chosen(nn.Module):
    """Is called with a function, which cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.gate = faulty.Layer(faulty.gate, faulty.log_of_negatives)

    def forward(self, x, function):
        return function(self.gate(x))


@pytest.mark.parametrize("inside", [True, False])
def test_arguments_that_cannot_be_pickled_leave_the_rest_of_the_bundle(tmp_path, inside):
    model = Chosen().bfloat16()
    model.gate.broken = inside
    engine = support.make_engine("bf16", model=model)
    guard = ng.attach(engine, ng.GuardConfig(repro_dir=tmp_path))
    x = torch.randn(4, faulty.WIDTH).bfloat16()
    engine.backward(engine(x, lambda y: y if inside else y / 0).float().square().mean())
    engine.step()
    guard.detach()
    (bundle,) = tmp_path.iterdir()
    about = json.loads((bundle / "bundle.json").read_text())
    assert "cannot be pickled" in about["why_no_batch"]
    assert ("cannot be pickled" in about["why_no_call"]) == (not inside)
    assert run_bundle(bundle).returncode == (0 if inside else 2)
    assert run_bundle(bundle, "--model", "faulty:Faulty").returncode == 2


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    engine = support.make_engine("bf16", model=Faulty().bfloat16())
    guard = ng.attach(engine, ng.GuardConfig(repro_dir=tmp_path / "file"))
    damage(engine, "log")
    train(engine, 0)
    assert guard.last_report.first.name == "gate"
    assert "the bundle could not be written" in caplog.text
    guard.detach()


@pytest.mark.parametrize("folder", [3, True])
def test_a_repro_dir_that_is_no_path_is_refused(folder):
    with pytest.raises(ng.InvalidInput, match="repro_dir must be the path of a folder"):
        ng.GuardConfig(repro_dir=folder)
