"""Pipelines: every rank calls other layers, the batch is on the first stage, the loss on the last."""

from __future__ import annotations

import pytest
from engine_ranks import run_engines

from deepspeed_support import run_ranks

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


for setup, stage, mode, has_operations, options in CASES:
    case = setup, stage, mode, options
    engines = [pipelines.make_engine(setup, stage, gradient_clipping=0.5, scale_power=13, **options) for _ in range(2)]
    engine, guard = engines[0], ng.attach(engines[0], ng.GuardConfig(policy=WARN, mode=mode))
    for number in range(2):
        losses = [step(one, number) for one in engines]
        norms = float(guard.grad_norm), engines[1].get_global_grad_norm()
        assert losses[0] == losses[1] or mode == "replace", (case, losses)
        assert not engine.is_last_stage() or engine.is_data_parallel or abs(guard.history[-1].loss - losses[0]) < 1e-5
        assert norms[1] is None or abs(norms[0] / float(norms[1]) - 1) < 1e-3, (case, norms)
    for mine, other in zip(engine.module.parameters(), engines[1].module.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-2 if mode == "replace" else 0.0, atol=1e-6), case
    assert guard.last_report is None and guard.findings == [], case
    COPIES = engine.grid.data_parallel_size
    FIRST, LAST = (engine.grid._topo.filter_match(pipe=place)[-1] for place in range(2))
    LOWEST = engine.grid._topo.filter_match(pipe=1)[0]
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

    if has_operations:
        for name, rank in (("1", FIRST), ("3", LAST)):
            with_layer(engine, name, root, 6)
            found = report_of(guard, engine.global_steps - 1)
            assert seen(found)[:1] + seen(found)[2:4] == ("forward_nonfinite", name, rank), (case, found)
            assert "sqrt" in found.first.operation, (case, found)
            with_layer(engine, name, pipelines.steep(torch.inf), 7)
            found = report_of(guard, engine.global_steps - 1)
            assert seen(found)[:1] + seen(found)[2:4] == ("backward_nonfinite", name, rank), (case, found)
        assert any("layer 3 (Block): stage 1 of 2" in line for line in found.evidence), found.evidence

        engine.module.loss_fn = lambda output, target: pipelines.loss_of(output, target) * torch.inf
        step(engine, 8)
        engine.module.loss_fn = pipelines.loss_of
        found = report_of(guard, engine.global_steps - 1)
        assert (found.verdict, found.first.kind, found.first.rank) == ("loss_nonfinite", "loss", LOWEST), found
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
    for number in range(12, 15):  # ranks that have left answer until they know that all have
        step(engine, number)
    assert "_INSTRUCTION_MAP" not in vars(engine) and "step" not in vars(engine.optimizer), case
"""


def test_two_stages():
    cases = [("fp16", 1, "replace", True, {"activation_checkpoint_interval": 1})]
    run_engines(f"CASES = {cases}{TOOLS}{FAULTS}")


@pytest.mark.multiprocess
def test_two_stages_of_two_copies(tmp_path):
    cases = [("fp32", 0, "observe", False, {"axes": ["data", "model", "pipe"]}), ("bf16", 1, "replace", True, {})]
    run_ranks(f"{HEAD}CASES = {cases}{TOOLS}{FAULTS}", tmp_path, ranks=4)


DECISIONS = """
def weights(engine):
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


for setup, stage in (("fp16", 0), ("fp16_fused", 0), ("bf16_fp32", 1)):
    engine, other = (pipelines.make_engine(setup, stage) for _ in range(2))
    guard = ng.attach(engine, ng.GuardConfig(policy=WARN))
    assert step(engine, 0) == step(other, 0) and all(map(torch.equal, weights(engine), weights(other))), setup
    for name in ("3.up.weight", "1.up.weight"):
        before = weights(engine)
        with_hook(engine, name, (0, 0), 1)
        assert all(map(torch.equal, before, weights(engine))), (setup, name)
        assert report_of(guard, engine.global_steps - 1).first.name == name, setup
    guard.detach()
"""


def test_what_overflows_on_one_stage_is_skipped_by_all():
    """https://github.com/deepspeedai/DeepSpeed/pull/994"""
    run_engines(f"{TOOLS}{DECISIONS}")


LEAVING = """
from hallo_numguard.guard.step.figure_exchange import FigureExchange


def leave_inside(guard, owner, name):
    method = getattr(owner, name)

    def leaving(*args, **kwargs):
        result = method(*args, **kwargs)
        setattr(owner, name, method)
        guard.detach()
        return result

    setattr(owner, name, leaving)


for setup, place in (("fp32", "scan"), ("fp32", "clip"), ("fp16", "scan")):
    engines = [pipelines.make_engine(setup, 0, gradient_clipping=0.5) for _ in range(2)]
    guard = ng.attach(engines[0], ng.GuardConfig(policy=WARN, mode="observe"))
    if RANK == 1:
        leave_inside(guard, *((FigureExchange, "finish") if place == "scan" else (engines[0], "clip_fp32_gradients")))
    for number in range(4):
        for engine in engines:
            pipelines.step(engine, number, (lambda x, _: x[0, 0].fill_(torch.nan)) if number == 2 else None)
    for mine, other in zip(engines[0].module.parameters(), engines[1].module.parameters(), strict=True):
        assert torch.isfinite(mine).all(), (setup, place)
        assert setup == "fp32" or torch.equal(mine, other), (setup, place)
    assert [row.applied for row in guard.history] == ([True, True, False, True] if RANK == 0 else [True])
    guard.detach()
    for number in (4, 5):
        pipelines.step(engines[0], number)
    assert "step" not in vars(engines[0].optimizer), (setup, place)
"""


def test_a_rank_that_is_detached_in_the_middle_of_a_step_makes_it_to_its_end():
    run_engines(f"{TOOLS}{LEAVING}")


TRANSFER = """
engine = pipelines.make_engine("bf16", 0, third=pipelines.RootNorm)
guard = ng.attach(engine, ng.GuardConfig(policy=WARN))
step(engine, 0)
for number, change in ((1, lambda x: x.zero_()), (2, lambda x: x[0, 0].fill_(torch.nan))):
    with_transfer(engine, change, number)
    report = report_of(guard, number)
    assert report.verdict == "undetermined", report
    assert report.summary == "stage 1 of the pipeline was given something else than stage 0 has returned", report
    assert "micro-batch 0: stage 0 has returned 64 values (0 of them NaN" in report.evidence[1], report.evidence
step(engine, 3)
assert guard.history[-1].applied
guard.detach()
"""


def test_what_is_lost_between_two_stages_is_told():
    """https://github.com/deepspeedai/Megatron-DeepSpeed/issues/203: zeros arrive, gradients become infinite."""
    run_engines(f"{TOOLS}{TRANSFER}")


SCALES = """
engine = pipelines.make_engine("fp16", 1, scale_power=12)
guard = ng.attach(engine, ng.GuardConfig(policy=WARN))
step(engine, 0)
for name, settles in (("3", False), ("1", True)):
    with_layer(engine, name, pipelines.steep(3e4), 1)
    report = report_of(guard, engine.global_steps - 1)
    assert report.verdict == "scale_too_high" and report.provisional is not settles, report
    assert settles == any("run again, this batch was finite at" in line for line in report.evidence), report
    assert settles != any("the stages before it cannot be tried" in line for line in report.evidence), report
step(engine, 2)

given = list(pipelines.batches(engine, 3))
given[0][1].mul_(200)  # each micro-batch has the gradients that were sent back for it
layer = part_of(engine, "1")
handle = layer and layer.register_forward_hook(lambda *call: pipelines.steep(30.0)(call[-1]))
engine.train_batch(iter(given))
report = report_of(guard, engine.global_steps - 1)
assert (report.verdict, report.provisional) == ("scale_too_high", False), report
assert any("the batch (micro-batch 0), run again, was not finite" in line for line in report.evidence), report
if handle is not None:
    handle.remove()
guard.detach()

engine = pipelines.make_engine("fp16", 1)
weight = part_of(engine, "3.down.weight")
if weight is not None:
    before, weight.data[1, 2] = weight.data[1, 2].clone(), torch.inf
guard = ng.attach(engine)
assert (weight is None) == (not guard.findings), guard.findings
for _ in range(2):  # the scale does not fall down to its minimum
    try:
        step(engine, 0)
    except ng.NumericsError as error:
        found = seen(error.report)
    assert found == ("weights_nonfinite", "parameter", "3.down.weight", 1, (1, 2)), found
if weight is not None:
    weight.data[1, 2] = before
step(engine, 1)
assert guard.history[-1].applied and engine.optimizer.loss_scale == 2.0**8, engine.optimizer.loss_scale
guard.detach()
"""


def test_loss_scales():
    """https://github.com/deepspeedai/DeepSpeed/issues/1773: down to 1, and for ever NaN."""
    run_engines(f"{TOOLS}{SCALES}")


REFUSED = """
import hallo_numguard.guard.rendezvous as rendezvous
engine = pipelines.make_engine("fp32", 1)

def is_refused(reason):
    try:
        ng.attach(engine)
    except ng.UnsupportedDeepSpeed as refused:
        assert reason in str(refused), refused
    else:
        raise AssertionError("not refused")

engine.grid.slice_parallel_size += RANK
is_refused("tensor parallelism inside of a pipeline")
engine.grid.slice_parallel_size = 1
engine.has_moe_layers = RANK == 1
is_refused("experts inside of a pipeline")
engine.has_moe_layers = False

rendezvous.MAX_WAIT_SECONDS, waits = 0.2, rendezvous.MAX_WAIT_SECONDS
for late in range(2):
    if RANK == late:
        try:
            ng.attach(engine)
        except ng.InvalidInput as refused:
            assert "not every rank has called attach" in str(refused), refused
        else:
            raise AssertionError("not refused")
    dist.barrier()
rendezvous.MAX_WAIT_SECONDS = waits
ng.attach(engine).detach()
step(engine, 0)
"""


def test_a_pipeline_is_guarded_on_all_ranks_or_on_none():
    run_engines(f"{TOOLS}{REFUSED}")


RUNS = """
engine = pipelines.make_engine("fp32", 1, offload=True)
keeper = ng.CheckpointKeeper(FOLDER, healthy_after=1)
guard = ng.attach(engine, ng.GuardConfig(keeper=keeper, policy=ng.Policy(on_unrecoverable="rollback")))
step(engine, 0)
keeper.save(engine)
step(engine, 1)
ng.inject(engine, "parameter", "3.up.weight", (1, 2), step=pipelines.MICRO_BATCHES + 1)
for number in (2, 3):
    step(engine, number)
assert seen(guard.last_report) == ("weights_nonfinite", "parameter", "3.up.weight", 1, (1, 2)), guard.last_report
assert engine.global_steps == 1, engine.global_steps
step(engine, 4)
assert guard.history[-1].applied
weight = part_of(engine, "1.up.weight")
if weight is not None:
    weight.data[0, 0] = torch.nan
try:
    engine.save_checkpoint(FOLDER)
except ng.NumericsError as error:
    assert seen(error.report)[2:] == ("1.up.weight", 0, (0, 0)), error
else:
    raise AssertionError("saved")
guard.detach()
"""


def test_rollback_and_saves(tmp_path):
    run_engines(f"FOLDER = {str(tmp_path)!r}{TOOLS}{RUNS}")
