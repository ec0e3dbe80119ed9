"""The guard on real DeepSpeed engines, one process: plant the fault, and watch it be found."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import hallo_numguard as ng

import deepspeed_support as support


def test_a_weight_that_is_bad_at_attach_is_a_finding_and_then_the_verdict(caplog):
    engine = support.make_engine("half")
    support.plant(engine, "hidden.weight", (1, 2), float("inf"))
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        guard = ng.attach(engine)
    assert [finding.offender.name for finding in guard.findings] == ["hidden.weight"]
    assert "hidden.weight[1, 2]" in caplog.text
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine)
    assert caught.value.report.first.pos_inf == 1
    assert caught.value.report.step == 1


def test_a_nan_that_the_loss_does_not_depend_on_is_found_in_the_backward_pass(make):
    """No token 7 in any batch, and its logit is cut off: the loss is finite at every scale, and the gradient never."""
    engine, _ = make("half", scale_power=8)
    support.plant(engine, "embedding.weight", (7, 0))
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine)
    report = caught.value.report
    assert report.verdict is ng.Verdict.WEIGHTS_NONFINITE
    assert (report.first.name, report.first.index, report.first.aliases) == (
        "embedding.weight",
        (7, 0),
        ("head.weight",),
    )


def test_a_mask_of_negative_infinity_is_neither_a_finding_nor_an_origin(make):
    engine, guard = make("half")
    assert guard.findings == []
    support.train_step(engine, 0)
    support.train_step(engine, 1, poison=float("nan"))
    assert guard.last_report.verdict is ng.Verdict.UNDETERMINED
    assert guard.last_report.first.kind == "loss"
    assert guard.last_report.first.nan == 1


def test_without_the_guard_deepspeed_halves_to_the_minimum_and_dies():
    engine = support.make_engine("half", scale_power=4)
    support.plant(engine, "hidden.weight", (0, 0))
    with pytest.raises(Exception, match="Current loss scale already at minimum"):
        for step in range(10):
            support.train_step(engine, step)


def test_at_the_minimum_scale_the_report_explains_deepspeed_giving_up(make):
    engine, _ = make("fp16", scale_power=2)
    with pytest.raises(ng.NumericsError) as caught:
        for step in range(10):
            support.train_step(engine, step, poison=float("nan"))
    assert "already at minimum" in str(caught.value.__cause__)
    assert caught.value.report.verdict in (ng.Verdict.UNDETERMINED, ng.Verdict.LOSS_NONFINITE)


def test_policy_warn_lets_deepspeed_go_on(make, caplog):
    config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
    engine, guard = make("half", config=config)
    support.plant(engine, "output.bias", (2,))
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        support.train_step(engine)
    assert "output.bias[2]" in caplog.text
    assert engine.optimizer.loss_scale == 2**7
    assert guard.last_report.verdict is ng.Verdict.WEIGHTS_NONFINITE


def test_what_on_overflow_returns_is_done(make):
    engine, _ = make("fp16", scale_power=30, on_overflow=lambda report: "raise")
    with pytest.raises(ng.NumericsError):
        support.train_step(engine)
    assert engine.optimizer.loss_scale == 2**30


@pytest.mark.parametrize("answer", ["stop", 3])
def test_an_answer_that_is_no_action_is_an_error(make, answer):
    engine, _ = make("fp16", scale_power=30, on_overflow=lambda report: answer)
    with pytest.raises(ng.InvalidInput, match="continue, warn, skip, rollback, raise"):
        support.train_step(engine)


def test_an_error_of_the_callback_reaches_the_user(make):
    def broken(report):
        raise KeyError("mine")

    engine, _ = make("fp16", scale_power=30, on_overflow=broken)
    with pytest.raises(KeyError, match="mine"):
        support.train_step(engine)


@pytest.mark.contains_failures
def test_a_failure_of_the_guard_is_logged_and_training_goes_on(make, caplog, monkeypatch):
    engine, guard = make("half")
    monkeypatch.setattr(guard._gradients, "scan", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR, "hallo_numguard"):
        for step in range(5):
            support.train_step(engine, step)
    assert caplog.text.count("failed in its scan of the gradients") == 3  # after which it is not tried any more
    assert "step" not in vars(engine.optimizer)


def test_a_checkpoint_is_checked_when_it_is_loaded_and_loads_without_the_guard(make, tmp_path):
    engine, guard = make("half")
    support.train_step(engine)
    guard.detach()  # which would refuse to save this
    support.plant(engine, "frozen.weight", (1, 1))
    engine.save_checkpoint(str(tmp_path), tag="t")
    other, guard = make("half")
    assert guard.findings == []
    other.load_checkpoint(str(tmp_path), tag="t")
    assert [finding.offender.name for finding in guard.findings] == ["frozen.weight"]
    support.make_engine("half").load_checkpoint(str(tmp_path), tag="t")


def test_an_engine_that_is_guarded_is_refused_with_the_remedy(make):
    engine, _ = make("half")
    with pytest.raises(ng.InvalidInput, match="detach"):
        ng.attach(engine)


def test_reports_are_dumped_with_the_history_of_every_parameter(make, tmp_path):
    engine, guard = make("fp16", config=ng.GuardConfig(dump_dir=tmp_path / "reports"))
    for step in range(3):
        support.train_step(engine, step)
    support.plant(engine, "hidden.weight", (1, 2))
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine, 3)
    (path,) = (tmp_path / "reports").iterdir()
    assert path.match("overflow-step00000004-rank0-*.json")
    read = ng.OverflowReport.from_json(path.read_text())
    assert read == caught.value.report
    with pytest.raises(ValueError, match="schema version"):
        ng.OverflowReport.from_json("{}")
    assert [(step.step, step.applied) for step in read.history] == [(n, n < 4) for n in (1, 2, 3, 4)]
    for theirs, ours in zip(read.history, guard.history, strict=True):
        assert dict(theirs.parameters) == dict(ours.parameters)
        assert set(ours.parameters) == {name for name, p in engine.module.named_parameters() if p.requires_grad}
    clean, bad = read.history[2], read.history[3]
    assert max(one.absmax for one in clean.parameters.values()) == clean.absmax
    assert math.hypot(*(one.norm for one in clean.parameters.values())) == pytest.approx(clean.norm)
    assert bad.parameters["embedding.weight"].nonfinite > 0
    assert clean.headroom == pytest.approx(math.log2(65504 / clean.absmax))
    assert read.environment["rank"] == 0
    assert read.environment["torch"] == torch.__version__


def test_a_report_that_cannot_be_written_stops_nothing(make, tmp_path, caplog):
    (tmp_path / "file").touch()
    engine, guard = make("fp16", scale_power=30, config=ng.GuardConfig(dump_dir=tmp_path / "file"))
    support.train_step(engine)
    assert "could not be written" in caplog.text
    assert guard.last_report.verdict is ng.Verdict.SCALE_TOO_HIGH


@pytest.mark.parametrize(("setup", "stage"), [("half", 2), ("fp16", 1), ("fp16", 3)])
def test_the_scale_that_is_named_is_the_one_where_deepspeed_settles(make, setup, stage):
    reports = []
    engine, guard = make(setup, stage=stage, on_overflow=reports.append)
    for _ in range(4):
        support.train_step(engine, 0)
    engine.optimizer.loss_scaler.cur_scale = 2.0**40
    steps = 4
    while not guard.history[-1].applied or steps == 4:
        support.train_step(engine, 0)
        steps += 1
    assert len(reports) > 10
    assert {report.verdict for report in reports} == {ng.Verdict.SCALE_TOO_HIGH}
    named = reports[0].settles_at
    assert f"expected to settle at 2^{math.log2(named):g}" in reports[0].advice
    assert guard.history[-1].loss_scale == named
    assert "as was expected" in guard.last_report.evidence[-1]


def test_without_a_finite_step_no_scale_is_named(make):
    engine, guard = make("half", scale_power=40)
    support.train_step(engine)
    assert guard.last_report.settles_at is None
    assert "until a step is finite" in guard.last_report.advice


def test_a_bad_sample_is_named_and_the_run_goes_on(make):
    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, batch, mask):
            return self.layer(batch["pixels"]) + mask

    engine, guard = make("half", model=Regression(), config=ng.GuardConfig(policy=ng.Policy(keep_scale=True)))
    mask = torch.zeros(3, dtype=torch.half, device=support.DEVICE)
    for step in range(4):
        pixels = torch.randn(4, 6).to(support.DEVICE, torch.half)
        if step == 2:
            pixels[3, 5] = float("nan")
        engine.backward(engine({"pixels": pixels}, mask=mask).float().square().mean())
        engine.step()
    report = guard.last_report
    assert report.verdict is ng.Verdict.INPUT_NONFINITE
    assert (report.first.kind, report.first.name, report.first.index) == ("input", "batch['pixels']", (3, 5))
    assert "sample 3, micro-batch 0" in str(report)
    assert [(record.applied, record.loss_scale) for record in guard.history] == [
        (True, 256), (True, 256), (False, 256), (True, 256)
    ]  # fmt: skip


def test_bad_samples_without_end_stop_the_run(make):
    policy = ng.Policy(max_consecutive_skips=3)
    engine, guard = make("half", model=torch.nn.Linear(6, 3), config=ng.GuardConfig(policy=policy))
    with pytest.raises(ng.NumericsError) as caught:
        for _ in range(5):
            engine.backward(
                engine(torch.full((4, 6), float("nan")).to(support.DEVICE, torch.half)).float().square().mean()
            )
            engine.step()
    assert caught.value.report.verdict is ng.Verdict.INPUT_NONFINITE
    assert caught.value.report.consecutive_skips == 3 == len(guard.history)


def test_a_batch_that_was_changed_after_the_forward_is_not_judged(make):
    engine, guard = make("fp16", model=torch.nn.Linear(6, 3))
    x = torch.randn(4, 6).to(support.DEVICE, torch.half)
    loss = engine(x).float().square().mean() * float("nan")
    engine.backward(loss)
    x[0, 0] = float("nan")
    engine.step()
    assert guard.last_report.verdict is ng.Verdict.UNDETERMINED
    assert any("changed since" in item for item in guard.last_report.not_checked)


def test_figures_go_to_the_trackers_of_the_engine(make, tmp_path):
    """Five series, on DeepSpeed's own axis, samples; in files that a person can read."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}}
    engine, guard = make("fp16", scale_power=30, **monitor)
    for step in range(20):
        support.train_step(engine, step)
    written = {path.stem: path.read_text().split() for path in (tmp_path / "run").glob("Numguard*.csv")}
    assert len(written) == 5
    skips = sum(not record.applied for record in guard.history)
    norms = [line.split(",") for line in written["Numguard_gradient_norm"][1:]]
    assert [int(samples) for samples, _ in norms] == [4 * step for step in range(1, 21)]
    assert float(norms[-1][1]) == pytest.approx(guard.history[-1].norm / guard.history[-1].loss_scale, rel=1e-6)
    counts = [int(float(line.split(",")[1])) for line in written["Numguard_skipped_in_a_row"][1:]]
    assert counts == [*range(1, skips + 1), *[0] * (20 - skips)]
    theirs = next(tmp_path.rglob("Train_Samples_lr.csv")).read_text().split()
    assert theirs[-1].split(",")[0] == "80", "their axis"


def test_training_continues_after_the_error_is_caught(make):
    """At the minimal scale DeepSpeed raises from inside of its step; the next one must not see what that one left."""
    engine, guard = make("fp16", scale_power=0)
    support.train_step(engine, 0)
    with pytest.raises(ng.NumericsError):
        support.train_step(engine, 1, poison=float("inf"))
    for parameter in engine.module.parameters():
        parameter.grad = None
    engine.optimizer.zero_grad()
    support.train_step(engine, 2)
    assert [record.applied for record in guard.history] == [True, False, True]
    assert guard.last_report.first.name == "loss"
    assert guard.last_report.first.shape == ()
