"""Updates that make weights non-finite, under each framework: named in the step in which they are made."""

from __future__ import annotations

import math

import pytest
import torch

import hallo_numguard as ng

from frameworks import FRAMEWORKS, each_framework, lightning_module

pytestmark = [
    pytest.mark.usefixtures("cpu_alone"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def with_bad_rate(framework, number, rate=math.nan):
    """A run of that framework whose optimizer has a bad learning rate in one of its steps."""
    faulty = framework.faulty("none")
    plant = faulty.plant

    def plant_rate(optimizer, *prefix):
        plant(optimizer, *prefix)
        while not isinstance(optimizer, torch.optim.AdamW):  # Accelerate's wrapper is an optimizer too
            optimizer = optimizer.optimizer
        steps = [0]

        def before(*_):
            steps[0] += 1
            for group in optimizer.param_groups:
                group["lr"] = rate if steps[0] == number else 1e-3

        optimizer.register_step_pre_hook(before)

    faulty.plant = plant_rate
    return faulty


@each_framework
def test_a_nan_learning_rate_is_named_in_its_step(framework, tmp_path):
    faulty = with_bad_rate(framework, 3)
    run = framework.train(faulty, tmp_path)
    assert run.raised
    (report,) = faulty.reports
    assert (report.step, report.verdict, report.recoverable) == (3, ng.Verdict.UPDATE_NONFINITE, False)
    assert report is run.guard.last_report
    assert report.first.kind == "parameter"
    assert report.first.name.startswith(framework.prefix)
    assert "parameter group 0" in " ".join(report.evidence)
    assert "file" not in report.advice
    assert len(run.guard.history) == 3


@each_framework
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_same_run_with_a_good_one_is_left_alone(framework, accumulate, tmp_path):
    faulty = with_bad_rate(framework, 3, rate=1e-3)
    run = framework.train(faulty, tmp_path, accumulate=accumulate)
    assert not run.raised
    assert faulty.reports == []
    assert run.guard.findings == []


@each_framework
def test_with_accumulated_micro_batches_it_is_the_optimizers_step_that_counts(framework, tmp_path):
    faulty = with_bad_rate(framework, 3)
    assert framework.train(faulty, tmp_path, accumulate=2).raised
    (report,) = faulty.reports
    assert (report.step, report.verdict) == (3, ng.Verdict.UPDATE_NONFINITE)


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_what_other_code_writes_after_the_update_is_not_the_optimizers(name, tmp_path):
    framework = FRAMEWORKS[name]
    faulty = framework.faulty("none")

    def after_step(number, _):
        if number == 3:
            faulty.model.norm.weight.data[2] = math.nan

    assert framework.train(faulty, tmp_path, after_step=after_step).raised
    (report,) = faulty.reports
    assert (report.step, report.verdict) == (4, ng.Verdict.WEIGHTS_NONFINITE)
    assert report.first.name == f"{framework.prefix}norm.weight"
    assert "finite right after the update of step 3: code outside of the optimizer's updates" in " ".join(
        report.evidence
    )


def test_what_a_lightning_module_writes_right_after_the_update_is_not_the_optimizers(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Averages(lightning_module(pl)):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 2:  # it counts a step when it is over
                self.net.norm.weight.data[2] = math.nan

    framework = FRAMEWORKS["lightning"]
    faulty = framework.faulty("none")
    made = []
    make, faulty.optimizer = faulty.optimizer, lambda: made.append(make()) or made[-1]
    assert framework.train(faulty, tmp_path, module=Averages).raised
    (report,) = faulty.reports
    assert (report.step, report.verdict) == (4, ng.Verdict.WEIGHTS_NONFINITE)
    assert "finite right after the update of step 3" in " ".join(report.evidence)
    assert not made[0]._optimizer_step_post_hooks


def test_a_scaler_of_an_accelerator(tmp_path):
    framework = FRAMEWORKS["accelerate"]
    faulty = with_bad_rate(framework, 3)
    assert framework.train(faulty, tmp_path, scale=2.0**8).raised
    (report,) = faulty.reports
    assert (report.step, report.verdict, report.loss_scale) == (3, ng.Verdict.UPDATE_NONFINITE, 256.0)
    assert not all(bool(torch.isfinite(item).all()) for item in faulty.model.parameters())
