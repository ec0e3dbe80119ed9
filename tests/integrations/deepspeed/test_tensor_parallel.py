"""Models cut over ranks: no rank decides alone, and an element has its index in the whole tensor."""

from __future__ import annotations

import pytest

from deepspeed_support import run_ranks

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import logging
import torch
import deepspeed_support as support
import tensor_parallel as tp

support.allow_fp16()
import deepspeed
import hallo_numguard as ng

deepspeed.init_distributed("gloo")
logging.disable(logging.CRITICAL)
WARN = ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000)
RANK, WORLD = torch.distributed.get_rank(), torch.distributed.get_world_size()
groups = tp.Groups()


def norm_of(engine):
    return float(engine.get_global_grad_norm() or 0.0)


for setup, stage, client in CASES:
    made = [tp.make_engine(setup, stage, groups if client else None, gradient_clipping=0.1) for _ in range(2)]
    guard = ng.attach(made[0], ng.GuardConfig(policy=WARN))
    case = setup, stage, client
    for step in range(3):
        losses = [tp.train_step(engine, step) for engine in made]
        assert losses[0] == losses[1], (case, step, losses)
        if stage > 0:  # at stage 0 DeepSpeed counts the parts of the first rank alone
            norms = float(guard.grad_norm), norm_of(made[0])
            assert abs(norms[0] / norms[1] - 1) < 0.02, (case, step, norms)
    assert guard.last_report is None and guard.findings == [], case

    # The parts of the last rank, and its copy of what every rank holds, which DeepSpeed's norm leaves out.
    for name, index, shape in (("output", (3, 14), (16, 24)), ("head", (3, 2), (8, 16))):
        if RANK == WORLD - 1:
            weight = getattr(made[0].module, name).weight
            handle = weight.register_hook(support.plant_in_gradient((3, 2)))
        tp.train_step(made[0], 3)
        if RANK == WORLD - 1:
            handle.remove()
        first = guard.last_report.first
        assert (first.name, first.index, first.shape, first.nan) == (f"{name}.weight", index, shape, 1), (case, first)
        assert first.rank == (1 if name == "output" and WORLD == 2 else None), (case, first)
        step = guard.last_report.step
        tp.train_step(made[0], 4)
        assert guard.last_report.step == step, case

    if RANK == WORLD - 1:
        weight = made[0].module.hidden.weight
        getattr(weight, "ds_tensor", weight.data).view(-1)[5 * 16 + 3] = torch.nan
    tp.train_step(made[0], 5)
    report = guard.last_report
    assert report.step == 8 and report.first.name == "hidden.weight" and report.verdict == "weights_nonfinite", report
    assert (report.first.index, report.first.shape) == ((17, 3), (24, 16)), (case, report)
    assert report.first.rank % 2 == 1 and report.first.nan == 1, (case, report)
    guard.detach()
    weights = [parameter for parameter in made[0].module.parameters() if not hasattr(parameter, "ds_tensor")]
    assert sum(int((~torch.isfinite(weight)).sum()) for weight in weights) <= 1, case
torch.distributed.barrier()
"""


def test_every_rank_of_a_model_that_is_cut_takes_part(tmp_path):
    cases = [("bf16_fp32", 1, False), ("bf16", 3, True)]  # others: `make chaos`
    run_ranks(f"CASES = {cases}{SCRIPT}", tmp_path, timeout=130)
