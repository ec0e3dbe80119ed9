"""Going back to the last healthy checkpoint, with real DeepSpeed engines: the damage is planted, and undone."""

from __future__ import annotations

import resource
import signal

import pytest
import torch
from engine_ranks import run_engines

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import BAD, SAVED, STEPS, train_and_save


@pytest.fixture
def attach(attach, tmp_path):
    """Attaches a guard that goes back; returns it and its keeper."""

    def build(engine, on_overflow=None, sinks=(), **policy):
        keeper = ng.CheckpointKeeper(tmp_path / "checkpoints", healthy_after=2)
        policy = ng.Policy(**{"on_unrecoverable": "rollback", **policy})
        return attach(engine, ng.GuardConfig(keeper=keeper, policy=policy, sinks=sinks), on_overflow), keeper

    return build


ENGINES = [
    {"setup": "fp16", "stage": 0},
    {"setup": "fp32", "stage": 0},
    {"setup": "half", "stage": 2},
    {"setup": "bf16", "stage": 2, "offload": True},
    {"setup": "fp16", "stage": 3},
]


@pytest.mark.parametrize("options", ENGINES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(
    ("kind", "where", "lost"),
    [
        ("parameter", "hidden.weight", BAD),
        ("parameter", "frozen.weight", BAD),
        ("optimizer_state", "norm.bias", BAD + 1),
    ],
)
def test_a_damaged_run_ends_as_one_that_never_saw_what_was_lost(tmp_path, options, kind, where, lost):
    support.check_rollback(tmp_path, options, lost, kind, where)


RANKS = """
for stage in (0, 2, 3):
    options = {"setup": "fp16", "stage": stage}
    support.check_rollback(f"FOLDER/{stage}", options, 7, "parameter", "hidden.weight", index=(20, 3), rank=1)
print("all went back")
"""


@pytest.mark.multiprocess
def test_two_ranks_go_back_together_though_one_was_damaged(tmp_path):
    outputs = run_engines(RANKS.replace("FOLDER", str(tmp_path / "checkpoints")))
    assert all("all went back" in output for output in outputs)


def test_after_the_last_rollback_that_is_allowed_it_raises(attach, caplog):
    engine = support.make_engine("fp16")
    guard, keeper = attach(engine, max_rollbacks=1)
    ng.inject(engine, "parameter", "hidden.weight", step=BAD)
    train_and_save(engine, keeper)
    assert "rollback 1 of 1" in caplog.text
    ng.inject(engine, "parameter", "norm.bias", step=1)
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine, 11)
    assert caught.value.report.first.name == "norm.bias"
    assert guard.last_report is caught.value.report


def test_without_a_healthy_checkpoint_it_raises_and_says_why(attach, caplog):
    engine = support.make_engine("fp16")
    _, keeper = attach(engine)
    support.train_step(engine, 1)
    saved = keeper.save(engine)
    ng.inject(engine, "parameter", "hidden.weight", step=1)
    with pytest.raises(ng.NumericsError) as caught:
        support.train_step(engine, 2)
    assert isinstance(caught.value.__cause__, ng.CheckpointFailed)
    assert f"{saved.path.name} (step 1) is passed over: it was not followed by enough clean steps" in caplog.text


def test_with_gradient_accumulation_it_goes_back_when_the_step_is_over(attach):
    engine = support.make_engine("fp16", gradient_accumulation_steps=2)
    guard, keeper = attach(engine)
    for micro_batch in range(1, 13):
        if micro_batch == 7:
            support.plant(engine, "hidden.weight", (3, 5))
        support.train_step(engine, micro_batch)
        if micro_batch == 2:
            keeper.save(engine)
    assert [(record.step, record.applied) for record in guard.history] == [
        *((1, True), (2, True), (3, True), (4, False)),
        *((2, True), (3, True)),
    ]
    assert engine.optimizer.loss_scale == 256, "as it was when the checkpoint was saved"


def test_a_callback_may_ask_for_it(attach):
    engine = support.make_engine("fp16")
    guard, keeper = attach(engine, on_overflow=lambda report: "rollback", on_unrecoverable="raise")
    ng.inject(engine, "activation", "hidden", step=BAD)
    train_and_save(engine, keeper)
    assert guard.last_report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert engine.global_steps == SAVED + STEPS - BAD


def test_figures_of_steps_that_are_repeated_are_written_again(attach, tmp_path):
    engine = support.make_engine("fp16")
    _, keeper = attach(engine, sinks=[f"csv:{tmp_path}/figures.csv"])
    ng.inject(engine, "parameter", "hidden.weight", step=BAD)
    train_and_save(engine, keeper)
    steps = [line.split(",")[0] for line in (tmp_path / "figures.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "2", "3", "4", "5", "6", "7", "4", "5", "6"]


def test_a_checkpoint_keeps_the_figures_of_its_step(attach):
    engine = support.make_engine("fp16")
    guard, keeper = attach(engine)
    losses = train_and_save(engine, keeper)
    meta = keeper.latest_healthy().meta
    record = guard.history[SAVED - 1]
    assert (meta.step, meta.loss_scale, meta.saved_by) == (SAVED, 256.0, "deepspeed")
    assert meta.loss == pytest.approx(losses[SAVED], rel=1e-3)
    assert meta.grad_norm == pytest.approx(record.norm / record.loss_scale)


def test_a_checkpoint_is_proved_by_clean_steps_in_a_row(attach):
    """A step that is lost to the loss scale is no sign of damage; one that is lost to the forward pass is."""
    engine = support.make_engine("fp16", scale_power=8)
    guard, keeper = attach(engine)
    support.train_step(engine, 1)
    keeper.save(engine)
    support.train_step(engine, 2)
    support.train_step(engine, 2, poison=1e4)
    assert guard.last_report.verdict is ng.Verdict.SCALE_TOO_HIGH
    support.train_step(engine, 2)
    assert keeper.latest_healthy().step == 1, "two clean steps, with a lower loss scale between them"
    saved = keeper.save(engine)
    support.train_step(engine, 2)
    ng.inject(engine, "activation", "hidden", step=1)
    support.train_step(engine, 3)
    assert guard.last_report.verdict is ng.Verdict.FORWARD_NONFINITE
    support.train_step(engine, 4)
    assert keeper.latest_healthy().step == 1
    support.train_step(engine, 5)
    assert keeper.latest_healthy() == saved


def test_the_policy_needs_a_keeper_to_go_back_with():
    with pytest.raises(ng.InvalidInput, match="give GuardConfig a keeper"):
        ng.GuardConfig(policy=ng.Policy(on_unrecoverable="rollback"))
    with pytest.raises(ng.InvalidInput, match="keeper must be a CheckpointKeeper"):
        ng.GuardConfig(keeper="checkpoints")
    with pytest.raises(ng.InvalidInput, match="max_rollbacks"):
        ng.Policy(max_rollbacks=-1)


def test_damage_in_a_checkpoint_is_never_gone_back_to(attach):
    """A moment is damaged, saved, and reaches the weights a step later: that checkpoint is never healthy."""
    engine = support.make_engine("fp16", stage=2)
    _, keeper = attach(engine, on_bad_save="warn")  # by default it would not be saved at all
    support.train_step(engine, 1)
    good = keeper.save(engine)
    support.train_step(engine, 2)
    support.train_step(engine, 3)
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    engine.optimizer.optimizer.state[flat]["exp_avg"][5] = float("nan")
    keeper.save(engine)
    support.train_step(engine, 4)
    assert keeper.latest_healthy() == good
    support.train_step(engine, 5)
    assert engine.global_steps == 1
    assert all(torch.isfinite(parameter).all() for parameter in engine.module.parameters())


def test_an_accelerator_that_runs_deepspeed(attach, alone):
    """Its `backward` steps the engine from inside; what it saves is what the engine goes back to."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    plugin = accelerate.utils.DeepSpeedPlugin(hf_ds_config={**config, "zero_allow_untested_optimizer": True})
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    model = torch.nn.Linear(6, 3)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    guard, keeper = attach(accelerator)
    ng.inject(model, "parameter", "weight", step=6)
    for step in range(1, 9):
        accelerator.backward(model(torch.randn(4, 6).to(support.DEVICE, torch.bfloat16)).float().square().mean())
        if step == 2:
            assert keeper.save(accelerator).step == 2
    assert guard.last_report.step == 6
    assert model.global_steps == 4
    assert [record.step for record in guard.history] == [1, 2, 3, 4, 5, 6, 3, 4]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_moment_that_is_not_finite_is_found_in_the_shards(tmp_path, caplog, stage):
    """No step has shown it: the gradient there may be zero for a long time."""
    engine = support.make_engine("fp16", stage=stage)
    keeper = ng.CheckpointKeeper(tmp_path, healthy_after=2)
    support.train_step(engine, 1)
    ng.inject(engine, "optimizer_state", "hidden.weight", index=(20, 3))
    engine(torch.zeros(4, 6, dtype=torch.long, device=support.DEVICE))
    bad = keeper.save(engine)
    keeper.clean_step()
    keeper.clean_step()
    assert f"checkpoint {bad} is not healthy" in caplog.text
    assert "exp_avg of hidden.weight[20, 3]" in caplog.text
    assert keeper.latest_healthy() is None


def test_a_disk_that_is_full_does_not_end_the_run(attach):
    engine = support.make_engine("fp16")
    _, keeper = attach(engine)
    support.train_step(engine, 1)
    saved = keeper.save(engine)
    support.train_step(engine, 2)
    support.train_step(engine, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
        with pytest.raises(ng.CheckpointFailed, match="could not save on rank 0"):
            keeper.save(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    support.train_step(engine, 4)
    assert keeper.latest_healthy() == saved
    assert keeper.save(engine).step == 4
