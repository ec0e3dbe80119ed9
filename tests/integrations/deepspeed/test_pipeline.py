"""Pipelines: every rank calls other layers, the batch is on the first stage, the loss on the last."""

from __future__ import annotations

import pytest

from deepspeed_support import run_ranks
from engine_ranks import run_engines

HEAD = """
import logging, os
import torch
import hallo_numguard as ng
logging.disable(logging.CRITICAL)
RANK = int(os.environ["RANK"])
"""

TOOLS = """
import torch.distributed as dist
import pipelines
from pipelines import TIED, step, with_hook, with_layer, with_transfer, part_of

WARN = ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000)


def report_of(guard, number):
    report = guard.last_report
    mine = report.step, report.verdict, report.first, report.evidence, report.offenders, report.advice
    others = [None] * dist.get_world_size()
    dist.all_gather_object(others, mine)
    assert all(other == mine for other in others), others
    assert report.step == number + 1, (number, report)
    return report


def seen(report):
    first = report.first
    return report.verdict.value, first.kind, first.name, first.rank, first.index
"""

FAULTS = """
def root(x):
    return torch.where(x > 0.3, (x * 0 - 1).sqrt(), x)


def twos(x, y):
    x[2, 5] = torch.nan


def labels(x, y):
    y[1, 3] = torch.nan


for setup, stage, options in CASES:
    case = setup, stage, options
    engines = [pipelines.make_engine(setup, stage, gradient_clipping=clip, scale_power=13, **options) for clip in (0.5, 0.5, 0.0, 0.0)]
    guards = [ng.attach(engines[at], ng.GuardConfig(policy=WARN, mode=mode))
              for at, mode in ((0, "observe"), (2, "replace"))]
    engine, guard = engines[0], guards[0]
    for number in range(2):
        losses = [step(one, number) for one in engines]
        assert losses[0] == losses[1] and losses[2] == losses[3], (case, losses)
        norms = float(guard.grad_norm), engines[1].get_global_grad_norm()
        assert norms[1] is None or setup == "fp16_fused" or abs(norms[0] / float(norms[1]) - 1) < 1e-3, (case, norms)
    for left, right in ((0, 1), (2, 3)):
        for mine, other in zip(engines[left].module.parameters(), engines[right].module.parameters(), strict=True):
            assert torch.equal(mine, other), case
    assert all(one.last_report is None and one.findings == [] for one in guards), case
    guards[1].detach()
    COPIES = engine.grid.data_parallel_size
    FIRST, LAST = COPIES - 1, 2 * COPIES - 1
    alone = COPIES == 1

    for name, rank in (("3.up.weight", LAST), ("1.down.bias", FIRST), (TIED, None)):
        with_hook(engine, name, (3,) if name.endswith("bias") else (3, 2), 2)
        found = report_of(guard, engine.global_steps - 1)
        assert (found.first.kind, found.first.name, found.first.nan) == ("gradient", name, 1), (case, found)
        assert found.first.rank in ((rank,) if alone else (rank, None)), (case, found)
        assert found.first.index == ((3,) if name.endswith("bias") else (3, 2)), (case, found)
    step(engine, 3)
    assert guard.history[-1].applied, (case, guard.last_report, guard.history[-2:])

    step(engine, 4, twos)
    found = report_of(guard, engine.global_steps - 1)
    assert seen(found) == ("input_nonfinite", "input", "forward_input", FIRST, (2, 5)), (case, found)
    assert any("micro-batch 3" in line for line in found.evidence), found
    step(engine, 5, labels)
    found = report_of(guard, engine.global_steps - 1)
    assert seen(found) == ("input_nonfinite", "input", "labels", LAST, (1, 3)), (case, found)

    for name, rank in (("1", FIRST), ("3", LAST)):
        with_layer(engine, name, root, 6)
        found = report_of(guard, engine.global_steps - 1)
        assert (found.verdict, found.first.name, found.first.rank) == ("forward_nonfinite", name, rank), (case, found)
        assert "sqrt" in found.first.operation, (case, found)
        with_layer(engine, name, pipelines.steep(torch.inf), 7)
        found = report_of(guard, engine.global_steps - 1)
        assert (found.verdict, found.first.name, found.first.rank) == ("backward_nonfinite", name, rank), (case, found)
    assert any("layer 3 (Block): stage 1 of 2" in line for line in found.evidence), found.evidence

    engine.module.loss_fn = lambda output, target: pipelines.loss_of(output, target) * torch.inf
    step(engine, 8)
    engine.module.loss_fn = pipelines.loss_of
    found = report_of(guard, engine.global_steps - 1)
    assert (found.verdict, found.first.kind, found.first.rank) == ("loss_nonfinite", "loss", 2 * COPIES - COPIES), found
    assert "mul" in found.first.operation, found

    with_transfer(engine, lambda x: x.zero_(), 9)
    step(engine, 10)
    assert guard.history[-1].applied, (case, guard.last_report, guard.history[-2:])
    for name, rank in (("1.up.weight", FIRST), ("3.down.weight", LAST)):
        weight = part_of(engine, name)
        if weight is not None:
            before, weight.data[5, 3] = weight.data[5, 3].clone(), torch.nan
        step(engine, 11)
        found = report_of(guard, engine.global_steps - 1)
        assert seen(found) == ("weights_nonfinite", "parameter", name, rank, (5, 3)), (case, found)
        if weight is not None:
            weight.data[5, 3] = before
    guard.detach()
    step(engine, 12)
    assert "_INSTRUCTION_MAP" not in vars(engine), case
"""


def test_two_stages():
    cases = [("fp32", 0, {}), ("bf16", 1, {}), ("fp16", 1, {}), ("bf16_fp32", 1, {"activation_checkpoint_interval": 1})]
    run_engines(f"CASES = {cases}{TOOLS}{FAULTS}")


@pytest.mark.multiprocess
def test_two_stages_of_two_copies(tmp_path):
    cases = [("fp32", 1, {}), ("fp16_fused", 0, {}), ("bf16", 0, {})]
    run_ranks(f"{HEAD}CASES = {cases}{TOOLS}{FAULTS}", tmp_path, ranks=4)
