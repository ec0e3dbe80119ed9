"""Running the bad batch again: what it proves, and that training never notices."""

from __future__ import annotations

import itertools

import deepspeed
import pytest
import torch
from engine_ranks import run_engines
from torch import nn
from torch.utils.checkpoint import checkpoint

import hallo_numguard as ng
from hallo_numguard.tracing.rerun import is_rerunning

import deepspeed_support as support
from deepspeed_support import name_of, plant_in_gradient, weights

STAGES = [
    ("fp32", 0, False, None),
    ("bf16", 0, False, None),
    ("bf16_fp32", 1, False, None),
    ("half", 2, False, None),
    ("fp16", 2, True, None),
    ("fp16", 3, False, None),
    ("bf16", 3, True, None),
]


class Noisy(nn.Module):
    """Dropout, running statistics, and a loss inside of the model or outside."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.GELU(), nn.Linear(12, 12))
        self.leave = nn.Linear(12, 3)
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.enter(x))
        if self.checkpointing == "deepspeed":
            x = deepspeed.checkpointing.checkpoint(self.block, x)
        elif self.checkpointing:
            x = checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
        else:
            x = self.block(x)
        x = self.leave(x)
        return x if target is None else (x - target).float().square().mean()


def make(kind, model=None, **options):
    setup, stage, offload, _ = kind
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "half": torch.float16}.get(setup, torch.bfloat16)
    return support.make_engine(setup, stage=stage, offload=offload, model=(model or Noisy()).to(dtype), **options)


def batch(engine, step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(engine.module.parameters()))


def train(engine, step, inside=False, poison=1.0):
    x = batch(engine, step)
    loss = engine(x, x.new_zeros(8, 3)) if inside else engine(x).float().square().mean()
    engine.backward(loss * poison)
    engine.step()
    return loss.item()


def run(kind, guarded, bad_loss):
    """Six steps, the third of them bad; returns losses, weights and statistics."""
    engine = make(kind)
    guard = ng.attach(engine, ng.GuardConfig(local_gradients="never")) if guarded else None
    torch.manual_seed(7)
    losses = []
    for step in range(6):
        handle = None
        if step == 2 and not bad_loss:
            handle = engine.module.enter.weight.register_hook(plant_in_gradient((1, 2)))
        losses.append(train(engine, step, poison=float("inf") if step == 2 and bad_loss else 1.0))
        if handle is not None:
            handle.remove()
    report = guard.last_report if guard is not None else None
    if guard is not None:
        guard.detach()
    return losses, weights(engine), engine.module.norm.running_mean.clone(), torch.get_rng_state(), report


# What DeepSpeed skips by itself in the same way, so that the only difference is that the batch was run again.
COMPARABLE = [kind for kind in STAGES if kind[0] != "fp32" and not kind[2]]


@pytest.mark.parametrize("bad_loss", [True, False], ids=["loss", "gradient"])
@pytest.mark.parametrize("kind", COMPARABLE, ids=name_of)
def test_the_continued_run_is_the_same_bits_as_one_that_was_never_run_again(kind, bad_loss):
    losses, trained, mean, random, _ = run(kind, False, bad_loss)
    guarded_losses, guarded, guarded_mean, guarded_random, report = run(kind, True, bad_loss)
    assert any("run again" in line for line in report.evidence)
    assert not any("no answer" in line for line in report.evidence), "dropout must be the same again"
    assert guarded_losses == losses
    assert torch.equal(guarded_mean, mean)
    assert torch.equal(guarded_random, random)
    assert all(torch.equal(value, guarded[name]) for name, value in trained.items())


@pytest.mark.parametrize("kind", STAGES, ids=name_of)
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("checkpointing", ["", "reentrant", "not reentrant", "deepspeed"])
def test_a_module_is_named_in_both_passes(attach, kind, inside, checkpointing):
    class Faulty(nn.Linear):
        fault = ""

        def forward(self, x):
            y = super().forward(x)
            if self.fault == "forward":
                return torch.log(-y.abs() - 1)
            return y + (y - y).sqrt() if self.fault == "backward" else y

    model = Noisy(checkpointing)
    model.block[0] = Faulty(12, 12)
    engine = make(kind, model, scale_power=4)
    guard = attach(engine)
    train(engine, 0, inside)
    for step, (fault, verdict) in enumerate(
        [("forward", ng.Verdict.FORWARD_NONFINITE), ("backward", ng.Verdict.BACKWARD_NONFINITE)], start=1
    ):
        model.block[0].fault = fault
        train(engine, step, inside)
        report = guard.last_report
        assert (report.verdict, report.first.module) == (verdict, "block.0"), str(report)
        assert not report.provisional
        assert not guard.history[-1].applied
    model.block[0].fault = ""
    train(engine, 3, inside)
    assert guard.history[-1].applied


def test_the_operation_is_named_in_the_report(attach):
    class Faulty(nn.Linear):
        def forward(self, x):
            return torch.log(super().forward(x) * 0 - 1)

    model = Noisy()
    model.block[0] = Faulty(12, 12)
    engine = make(("bf16", 2, False, None), model)
    guard = attach(engine)
    train(engine, 0)
    first = guard.last_report.first
    assert first.operation == "aten.log.default"
    assert "test_replay.py" in first.line


def test_a_model_that_is_not_the_same_twice_proves_nothing_but_that(attach):
    draws = itertools.count(1)  # which nobody can put back

    class Moody(Noisy):
        def forward(self, x):
            return super().forward(x) * next(draws)

    engine = make(("half", 2, False, None), Moody())
    guard = attach(engine)
    train(engine, 0, poison=float("nan"))
    report = guard.last_report
    assert report.verdict is ng.Verdict.UNDETERMINED, "one process has no other to be compared with"
    assert any("returned something else" in line for line in report.evidence)


def test_a_model_that_fails_when_it_is_run_again_stops_nothing(attach, caplog):
    class Once(Noisy):
        def forward(self, x):
            if is_rerunning():
                raise KeyError("mine")
            return super().forward(x)

    engine = make(("half", 2, False, None), Once())
    guard = attach(engine)
    train(engine, 0, poison=float("nan"))
    assert guard.last_report.verdict is ng.Verdict.UNDETERMINED
    assert any("its own error is in the log" in line for line in guard.last_report.evidence)
    assert "could not run the batch again" in caplog.text
    train(engine, 1)
    assert guard.history[-1].applied


@pytest.mark.parametrize("stage", [2, 3])
def test_the_micro_batch_that_was_bad_is_the_one_that_is_run_again(attach, stage):
    class Picky(Noisy):
        def forward(self, x):
            return super().forward(x) / (x.amax() < 50)  # a division by zero, of one batch

    engine = make(("bf16", stage, False, None), Picky(), gradient_accumulation_steps=3)
    guard = attach(engine)
    for micro_step in range(3):
        x = batch(engine, micro_step) * (100 if micro_step == 1 else 1)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    report = guard.last_report
    assert report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert (report.first.name, report.first.module) == ("output", ""), "the division is the root module's own code"
    assert any("micro-batch 1" in line for line in report.evidence)


def test_a_static_scale_that_is_too_high_is_named_with_one_that_is_not(attach):
    fp16 = {"enabled": True, "loss_scale": 2.0**17}
    model = Noisy()
    engine = support.make_engine("static", stage=2, model=model.half(), fp16=fp16)
    guard = attach(engine)
    x = batch(engine, 0) * 30
    engine.backward(engine(x, x.new_full((8, 3), 300.0)))
    engine.step()
    report = guard.last_report
    assert report.verdict is ng.Verdict.SCALE_TOO_HIGH
    assert report.recoverable is None
    assert f"set it to {report.settles_at:g}" in report.advice


RANK_FAULT = """
for stage, parts in ((0, 1), (2, 1), (3, 1), (2, 2)):
    engine = support.make_engine("bf16", stage=stage, gradient_accumulation_steps=parts)
    guard = ng.attach(engine, ng.GuardConfig(local_gradients="always"))
    for part in range(parts):
        support.train_step(engine, part)
    for part in range(parts):
        if part == parts - 1:
            ng.inject(engine, "gradient", "hidden.weight", index=(20, 5), rank=1)
        support.train_step(engine, 1)
    report = guard.last_report
    print("SAID", stage, parts, report.verdict, report.first.name, report.first.index, report.first.rank)
    if parts > 1:
        guard.detach()
        continue
    support.train_step(engine, 2)
    assert guard.history[-1].applied
    ng.inject(engine, "gradient", "hidden.weight", index=(20, 5), rank=1)
    try:
        support.train_step(engine, 3)
    except ng.NumericsError as error:
        print("STOPPED", stage, "it was so before on rank 1, in step 2" in error.report.evidence)
    guard.detach()
"""


@pytest.mark.multiprocess
def test_a_rank_that_was_wrong_once_is_named_and_stops_the_run_when_it_comes_back():
    for output in run_engines(RANK_FAULT):
        for stage in (0, 2, 3):
            assert f"SAID {stage} 1 rank_fault hidden.weight (20, 5) 1" in output
            assert f"STOPPED {stage} True" in output
        assert "SAID 2 2 rank_fault hidden.weight (20, 5) 1" in output  # in one micro-batch of two


def test_stage_3_trains_on_after_the_replay_of_a_model_that_reads_parameters_without_calling_their_module(attach):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)  # reads the weights of its out_proj
            self.last = nn.Linear(16, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    engine = support.make_engine("fp16", scale_power=30, stage=3, model=Attends())
    guard = attach(engine)
    for step in range(30):
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step)).to(support.DEVICE, torch.half)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    assert guard.last_report.verdict is ng.Verdict.SCALE_TOO_HIGH
    assert any("run again, this batch was finite" in line for line in guard.last_report.evidence), str(
        guard.last_report
    )
    assert guard.history[-1].applied
