"""Every optimizer class of DeepSpeed: its gradients are found, its training is not touched, its faults are named."""

from __future__ import annotations

import math
import os

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch.utils._python_dispatch import TorchDispatchMode

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import KINDS, name_of, plant_in_gradient, weights

each_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)


@pytest.fixture
def make(attach):
    def build(kind, guarded=True, config=None, on_overflow=None, **options):
        setup, stage, offload, expected = kind
        engine = support.make_engine(setup, stage=stage, offload=offload, **options)
        assert type(engine.optimizer).__name__ == expected
        return (engine, attach(engine, config, on_overflow)) if guarded else engine

    return build


@each_kind
@pytest.mark.parametrize("mode", ["replace", "observe"])
def test_finite_training_is_bit_identical_and_raises_no_alarm(make, kind, mode):
    plain = make(kind, guarded=False, gradient_clipping=0.0)
    losses = [support.train_step(plain, step) for step in range(4)]
    engine, guard = make(kind, config=ng.GuardConfig(mode=mode), gradient_clipping=0.0)
    assert [support.train_step(engine, step) for step in range(4)] == losses
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(engine).items())
    assert guard.last_report is None
    assert guard.findings == []
    assert [record.step for record in guard.history] == [1, 2, 3, 4]
    assert all(record.applied and record.nonfinite == 0 and record.norm > 0 for record in guard.history)


@each_kind
@pytest.mark.parametrize("mode", ["replace", "observe"])
def test_clipping_is_that_of_deepspeed_to_the_rounding_of_the_norm(make, kind, mode):
    plain = make(kind, guarded=False, gradient_clipping=0.1)
    theirs = [(support.train_step(plain, step), float(plain.get_global_grad_norm())) for step in range(4)]
    engine, _ = make(kind, config=ng.GuardConfig(mode=mode), gradient_clipping=0.1)
    ours = [(support.train_step(engine, step), float(engine.get_global_grad_norm())) for step in range(4)]
    assert ours == [pytest.approx(pair, rel=1e-2 if kind[0].startswith("bf16") else 2e-3) for pair in theirs]
    expected = weights(plain)
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3 if mode == "replace" else 0)


class Reductions(TorchDispatchMode):
    """Notes how many elements are read to find out what is not finite, or a norm."""

    OPERATIONS = ("amax", "amin", "isfinite", "isinf", "isnan", "linalg_vector_norm", "norm", "sum", "abs", "ne")

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in self.OPERATIONS and first is not None and first.is_floating_point():
            self.elements += first.numel()
        return func(*args, **(kwargs or {}))


REPLACED = [kind for kind in KINDS if kind[3].startswith("DeepSpeedZero")]


@pytest.mark.parametrize("kind", REPLACED, ids=name_of)
def test_in_replace_mode_deepspeed_makes_no_pass_of_its_own(make, kind):
    """Counted in elements that check and norm read, in the backward (offload) and in the step."""
    read = {}
    for mode in (None, "observe", "replace"):
        if mode is None:
            engine = make(kind, guarded=False, gradient_clipping=0.0)
        else:
            engine, _ = make(kind, config=ng.GuardConfig(mode=mode), gradient_clipping=0.0)
        support.train_step(engine, 0)
        tokens = torch.randint(0, 7, (4, 6), device=support.DEVICE)
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        with Reductions() as backward:
            engine.backward(loss)
        with Reductions() as step:
            engine.step()
        read[mode] = backward.elements + step.elements
    gradients = 900  # the model has 984 elements that take a gradient; the table costs a few
    assert read["observe"] - read[None] < gradients / 2, "the table is read, no gradient twice"
    assert read[None] - read["replace"] > gradients


@each_kind
def test_the_norm_is_deepspeeds_but_exact(make, kind):
    engine, guard = make(kind, gradient_clipping=0.0)
    for step in range(2):
        support.train_step(engine, step)
        record = guard.history[-1]
        theirs = float(engine.get_global_grad_norm())
        ours = record.norm / (1.0 if kind[:2] == ("fp16", 0) else record.loss_scale)  # stage 0 gives the scaled norm
        assert ours == pytest.approx(theirs, rel=2e-2)


HALF_PRECISION = [kind for kind in KINDS if kind[0] in ("fp16", "half") and kind[1] > 0]
PLACES = [("hidden.weight", (7, 3)), ("norm.bias", (5,)), ("frozen.weight", (2, 7))]  # sliced, small, frozen
OTHER_PLACES = [
    ("embedding.weight", (3, 5)),
    ("frozen.bias", (11,)),
    ("hidden.bias", (0,)),
    ("norm.weight", (4,)),
    ("output.weight", (15, 23)),
    ("output.bias", (1,)),
]
PLANTED = [(kind, *place) for kind in KINDS for place in PLACES] + [
    (kind, *place) for kind in HALF_PRECISION if kind[1:3] == (2, False) for place in OTHER_PLACES
]


@pytest.mark.parametrize(
    ("kind", "name", "index"), PLANTED, ids=[f"{name_of(kind)}-{name}" for kind, name, _ in PLANTED]
)
def test_a_nan_weight_is_named(make, kind, name, index):
    engine, guard = make(kind)
    injection = ng.inject(engine, "parameter", name, index, step=3)
    support.train_step(engine, 0)
    support.train_step(engine, 1)
    assert not injection.planted
    assert all(record.applied for record in guard.history)
    before = weights(engine)
    others = {  # stage 3 gathers and partitions what is frozen
        key
        for key, parameter in engine.module.named_parameters()
        if key != name and (parameter.requires_grad or kind[1] < 3)
    }
    with pytest.raises(ng.NumericsError) as caught:
        for step in range(2, 20):  # the row of the embedding may not be in every batch
            support.train_step(engine, step)
    assert injection.planted
    report = caught.value.report
    assert report is guard.last_report
    assert report.verdict is ng.Verdict.WEIGHTS_NONFINITE
    assert report.recoverable is False
    assert (report.first.kind, report.first.name, report.first.index) == ("parameter", name, index)
    assert (report.first.nan, report.first.pos_inf, report.first.neg_inf, report.first.rank) == (1, 0, 0, 0)
    assert str(caught.value).startswith("Step ")
    assert name in str(caught.value)
    if name != "embedding.weight":
        after = weights(engine)
        assert all(torch.equal(after[key], before[key]) for key in others)


@each_kind
def test_a_nan_born_in_backward_is_named_with_its_element(make, kind):
    engine, guard = make(kind)
    support.train_step(engine, 0)
    parameter = dict(engine.module.named_parameters())["hidden.weight"]
    handle = parameter.register_hook(plant_in_gradient((9, 4)))
    support.train_step(engine, 1)
    handle.remove()
    report = guard.last_report
    assert [offender.name for offender in report.offenders] == ["hidden.weight"]
    assert (report.offenders[0].index, report.offenders[0].nan, report.offenders[0].nonfinite) == ((9, 4), 1, 1)
    if not kind[0].startswith("fp16") and kind[0] != "half":  # without scaling there is nothing else to blame
        assert report.verdict is ng.Verdict.UNDETERMINED  # not the model's call has made it, but a hook
        assert (report.first.name, report.first.module) == ("hidden.weight", "hidden")
        assert "a hook" in report.advice
    assert all(torch.isfinite(value).all() for value in weights(engine).values())
    support.train_step(engine, 2)
    ng.inject(engine, "gradient", "hidden.weight", (20, 5))  # bad once
    support.train_step(engine, 3)
    assert [(one.name, one.index) for one in guard.last_report.offenders] == [("hidden.weight", (20, 5))]
    support.train_step(engine, 4)
    assert [record.applied for record in guard.history] == [True, False, True, False, True]


@each_kind
def test_a_loss_that_is_not_finite_is_what_comes_first(make, kind):
    engine, guard = make(kind)
    support.train_step(engine, 0)
    support.train_step(engine, 1, poison=float("inf"))
    report = guard.last_report
    assert report.first.kind == "loss"
    assert report.verdict is ng.Verdict.UNDETERMINED
    assert report.recoverable is None
    assert "the same batch, run again, was finite in every module" in report.evidence
    assert "made after the model" in report.advice
    support.train_step(engine, 2)
    assert guard.history[-1].applied


@pytest.mark.parametrize("kind", HALF_PRECISION, ids=name_of)
def test_a_scale_that_is_too_high_settles(make, kind):
    reports = []
    engine, guard = make(kind, scale_power=30, on_overflow=reports.append)
    for step in range(25):
        support.train_step(engine, step)
    assert {report.verdict for report in reports} == {ng.Verdict.SCALE_TOO_HIGH}
    assert all(report.recoverable for report in reports)
    assert reports[0].provisional, "the gradient that reaches the model is Inf already"
    assert not reports[-1].provisional, "run again at the next scale, the batch was finite"
    assert reports[0].first.kind == "gradient"
    assert reports[0].first == reports[0].offenders[0]
    last = guard.last_report
    assert last.verdict is ng.Verdict.SCALE_TOO_HIGH
    assert not last.provisional
    scale = engine.optimizer.loss_scale
    assert f"settled at 2^{math.log2(scale):g} after {len(reports)} skipped" in last.advice
    assert f"({scale:g})" in " ".join(last.evidence)
    assert [record.applied for record in guard.history][: len(reports)] == [False] * len(reports)
    assert guard.history[-1].applied


@each_kind
def test_detach_leaves_nothing_behind(make, kind):
    engine = make(kind, guarded=False)
    support.train_step(engine)
    before, step = (set(vars(engine.optimizer)), set(vars(engine))), vars(engine.optimizer).get("step")
    guard = ng.attach(engine)
    assert engine.optimizer.step is not step
    guard.detach()
    assert (set(vars(engine.optimizer)), set(vars(engine))) == before
    support.train_step(engine, 1)
    assert guard.history == []
    ng.attach(engine).detach()


@pytest.mark.parametrize("setup", ["fp16", "bf16_fp32"])
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"gradient_clipping": 0.01}])
def test_accumulation_and_clipping(make, setup, options):
    kind = (setup, 2, False, "DeepSpeedZeroOptimizer")
    plain = make(kind, guarded=False, **options)
    losses = [support.train_step(plain, step) for step in range(6)]
    engine, guard = make(kind, **options)
    assert [support.train_step(engine, step) for step in range(6)] == losses
    assert len(guard.history) == 6 // options.get("gradient_accumulation_steps", 1)


@pytest.mark.parametrize("name", ["contiguous_gradients", "overlap_comm", "round_robin_gradients"])
@pytest.mark.parametrize("value", [False, True])
def test_options_of_zero_2_move_gradients_but_not_their_names(make, name, value):
    options = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500, name: value}}
    engine, guard = make(("fp16", 2, False, "DeepSpeedZeroOptimizer"), **options)
    handle = dict(engine.module.named_parameters())["output.weight"].register_hook(plant_in_gradient((1, 2)))
    support.train_step(engine)
    handle.remove()
    assert [(one.name, one.index) for one in guard.last_report.offenders] == [("output.weight", (1, 2))]


def test_this_is_one_process():
    assert os.environ["WORLD_SIZE"] == "1"


@each_kind
def test_a_nan_in_the_optimizers_state_is_what_came_first(make, kind):
    engine, _ = make(kind)
    support.train_step(engine, 0)
    ng.inject(engine, "optimizer_state", "output.weight", (5, 11))
    with pytest.raises(ng.NumericsError) as caught:
        for step in range(1, 4):
            support.train_step(engine, step)
    first = caught.value.report.first
    assert caught.value.report.verdict is ng.Verdict.OPTIMIZER_STATE_NONFINITE
    assert (first.kind, first.name, first.index) == ("optimizer_state", "output.weight", (5, 11))
    assert caught.value.report.recoverable is False


def test_damaged_state_is_found_when_a_checkpoint_is_loaded(make, tmp_path):
    kind = ("bf16", 2, False, "DeepSpeedZeroOptimizer")
    engine, guard = make(kind)
    support.train_step(engine, 0)
    guard.detach()
    parameter = dict(engine.module.named_parameters())["output.weight"]
    moment = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
    moment[5, 11] = float("nan")
    safe_set_full_optimizer_state(parameter, moment, "exp_avg_sq")
    engine.save_checkpoint(str(tmp_path), tag="t")
    other, guard = make(kind)
    support.train_step(other, 0)
    other.load_checkpoint(str(tmp_path), tag="t")
    (finding,) = guard.findings
    assert (finding.offender.kind, finding.offender.name, finding.offender.index) == (
        "optimizer_state",
        "output.weight",
        (5, 11),
    )
    assert "writes it into the weights" in str(finding)


FLOAT32 = ("fp32", 0, False, "AdamW")


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_stage_0_in_float32_is_clipped_as_deepspeed_does_without_its_norm(make, max_norm):
    plain = make(FLOAT32, guarded=False, gradient_clipping=max_norm)
    theirs = [support.train_step(plain, step) for step in range(4)]
    engine, guard = make(FLOAT32, gradient_clipping=max_norm)
    assert [support.train_step(engine, step) for step in range(4)] == pytest.approx(theirs, rel=1e-5)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(engine)[name], value, rtol=1e-5, atol=1e-6)
    assert guard.history[0].norm > 0.1, "before clipping"
    read = {}
    for mode in ("observe", "replace"):
        engine, guard = make(FLOAT32, config=ng.GuardConfig(mode=mode), gradient_clipping=max_norm)
        tokens = torch.zeros(4, 6, dtype=torch.long, device=support.DEVICE)
        loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        with Reductions() as step:
            engine.step()
        read[mode] = step.elements
    assert read["observe"] - read["replace"] > 900
