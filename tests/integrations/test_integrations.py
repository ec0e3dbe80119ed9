"""What attach() takes, what it says of the rest, and how another package joins in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import hallo_numguard as ng

from paths import ROOT

SOURCE = '''
import hallo_numguard as ng


class Fit:
    """Somebody's framework."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def step(self, batch):
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def guard_fit(target, config, on_overflow):
    if not isinstance(target, Fit):
        return None
    target.optimizer = ng.GuardedOptimizer(target.optimizer, target.model, config, on_overflow)
    return target.optimizer
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "their-framework"
version = "1.0"
[project.entry-points."hallo_numguard.integrations"]
theirs = "their_framework:guard_fit"
[tool.setuptools]
py-modules = ["their_framework"]
"""


@pytest.fixture
def their_framework(tmp_path, monkeypatch):
    """A distribution of another project, built and installed into a folder of its own."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "their_framework.py").write_text(SOURCE)
    (source / "pyproject.toml").write_text(PROJECT)
    command = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", str(installed), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    monkeypatch.syspath_prepend(str(installed))
    yield installed
    sys.modules.pop("their_framework", None)


def test_another_package_offers_an_integration(their_framework):
    from their_framework import Fit

    model = nn.Linear(4, 1)
    fit = Fit(model, torch.optim.AdamW(model.parameters()))
    guard = ng.attach(fit, ng.GuardConfig(history=2))
    ng.inject(model, "parameter", "weight", index=(0, 2), step=3)
    fit.step(torch.ones(2, 4))
    fit.step(torch.ones(2, 4))
    with pytest.raises(ng.NumericsError) as caught:
        fit.step(torch.ones(2, 4))
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("weight", (0, 2))
    assert len(guard.history) == 2
    with pytest.raises(ng.InvalidInput, match=r"or what the integrations theirs take\), got object"):
        ng.attach(object())


def test_one_that_gives_no_guard_is_named(their_framework):
    (their_framework / "their_framework.py").write_text("def guard_fit(*_):\n    return 3\n")
    with pytest.raises(ng.InvalidInput, match="'theirs' gave a int, which lacks last_report"):
        ng.attach(object())


def test_one_that_cannot_be_loaded_is_named(their_framework):
    (their_framework / "their_framework.py").write_text("import what_is_not_there\n")
    with pytest.raises(ng.InvalidInput, match=r"'theirs' \(their_framework:guard_fit\) cannot be loaded: No module"):
        ng.attach(object())


@pytest.mark.parametrize("target", [nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), None])
def test_the_error_for_any_other_target_lists_what_attach_takes(target):
    with pytest.raises(ng.InvalidInput) as caught:
        ng.attach(target)
    message = str(caught.value)
    for taken in (
        "deepspeed.initialize",
        "accelerate.Accelerator after prepare()",
        "transformers.Trainer",
        "lightning.pytorch.Trainer",
        "GuardedOptimizer(optimizer, model)",
    ):
        assert taken in message
    assert f"got {type(target).__name__}" in message


def test_a_class_of_the_same_name_is_not_taken_for_theirs():
    class Trainer:
        callbacks = ()

    with pytest.raises(ng.InvalidInput, match="got Trainer"):
        ng.attach(Trainer())


def test_no_framework_is_imported_before_it_is_used():
    code = (
        "import sys, hallo_numguard as ng\n"
        "assert ng.integrations.attach is ng.attach\n"
        "ng.GuardedOptimizer\n"
        "names = {'deepspeed', 'accelerate', 'transformers', 'lightning', 'pytorch_lightning'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
