"""Engines with frozen integers, sparse gradients, states of eight bits, and parameters that only the optimizer has."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unusual_tensors import EightBit, LowRank, Quantized

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import weights

NAN = float("nan")
INTEGERS = "3 tensors are not checked, because they hold integers: base.codes, base.signed, base.mask"
KINDS = [
    ("fp16", 0, False),
    ("fp16_fused", 0, False),
    ("fp32", 0, False),
    ("bf16_fp32", 1, False),
    ("fp16", 2, False),
    ("fp16", 2, True),
    ("fp32", 2, False),
    ("fp16", 3, False),
    ("bf16", 3, True),
    ("fp32", 3, False),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-stage{kind[1]}{'-offload' * kind[2]}")


def engine_of(kind, model, scale_power=2, **options):
    setup, stage, offload = kind
    torch.manual_seed(0)
    return support.make_engine(setup, scale_power, stage=stage, offload=offload, model=model(), **options)


def train(engine, steps, bad=None, extra=None):
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        if step == bad:
            x[1, 2] = NAN
        loss = engine(x.to(engine.module.down.weight)).float().square().mean()
        engine.backward(loss if extra is None else loss + extra.square().sum())
        engine.step()


@pytest.fixture
def low_rank():
    def build():
        torch.manual_seed(0)
        model = LowRank()
        del model.base.phase  # of complex numbers no framework makes half ones
        return model

    return build


@each_kind
@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_frozen_integers_are_said_once_and_train_as_without_a_guard(attach, low_rank, kind, clipping):
    plain = engine_of(kind, low_rank, gradient_clipping=clipping)
    train(plain, range(1, 4))
    engine = engine_of(kind, low_rank, gradient_clipping=clipping)
    guard = attach(engine)
    train(engine, range(1, 4))
    expected = weights(plain)
    for name, value in weights(engine).items():
        if clipping and value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(value, expected[name])
    assert [(finding.kind, finding.message) for finding in guard.findings] == [("not_checked", INTEGERS)]
    train(engine, [4], bad=4)
    report = guard.last_report
    assert (report.verdict, report.first.name, report.first.index) == ("input_nonfinite", "x", (1, 2))
    assert len(guard.findings) == 1


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8, sparse=True)
        self.down = nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.table(torch.tensor([1, 5, 1, 9], device=x.device)) + x)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_sparse_gradients_at_stage_0(attach, clipping):
    kind = ("fp32", 0, False)
    plain = engine_of(kind, Recommender, optimizer_of=sgd, gradient_clipping=clipping)
    train(plain, range(1, 4))
    engine = engine_of(kind, Recommender, optimizer_of=sgd, gradient_clipping=clipping)
    guard = attach(engine)
    train(engine, range(1, 4))
    expected = weights(plain)
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5 if clipping else 0, atol=1e-7 if clipping else 0)

    def plant(gradient):
        values = gradient._values().clone()
        values[3, 2] = NAN  # of token 9
        return torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape)

    engine.module.table.weight.register_hook(plant)
    before = engine.module.table.weight.detach().clone()
    train(engine, [4])
    assert (guard.last_report.offenders[0].name, guard.last_report.offenders[0].index) == ("table.weight", (9, 2))
    assert torch.equal(engine.module.table.weight, before)
    assert guard.findings == []


@pytest.mark.parametrize("setup", ["fp32", "fp16", "fp16_fused"])
@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_learnt_loss_weights_outside_of_the_model(attach, low_rank, setup, clipping):
    """At stage 0: ZeRO itself does not take them."""
    runs = []
    for guarded in (False, True):
        extra = nn.Parameter(torch.ones(2, device=support.DEVICE))

        def groups_of(model, extra=extra):
            return [{"params": support.trained_by(model)}, {"params": [extra]}]

        engine = engine_of((setup, 0, False), low_rank, groups_of=groups_of, gradient_clipping=clipping)
        guard = attach(engine) if guarded else None
        train(engine, range(1, 4), extra=extra)
        runs.append([*weights(engine).values(), extra.detach()])
    close = {"rtol": 1e-3, "atol": 1e-4} if clipping else {"rtol": 0, "atol": 0}
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, **close)
    assert guard.history[-1].parameters["param_groups[1][0]"].norm > 0
    with torch.no_grad():
        extra[1] = NAN
    with pytest.raises(ng.NumericsError) as caught:
        train(engine, [4], extra=extra)
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("param_groups[1][0]", (1,))


def test_a_group_that_is_added_later_is_checked(attach, low_rank):
    engine = engine_of(("fp32", 0, False), low_rank)
    guard = attach(engine)
    train(engine, [1])
    extra = nn.Parameter(torch.ones(2, device=support.DEVICE))
    engine.optimizer.add_param_group({"params": [extra]})
    train(engine, [2], extra=extra)
    assert not torch.equal(extra, torch.ones_like(extra))
    extra.register_hook(lambda gradient: gradient * NAN)
    before = extra.detach().clone()
    train(engine, [3], extra=extra)
    assert guard.last_report.step == 3
    assert [item.name for item in guard.last_report.offenders] == ["param_groups[1][0]"]
    assert torch.equal(extra, before)
    assert [record.step for record in guard.history] == [1, 2, 3]


@pytest.mark.parametrize("kind", [("fp32", 0, False), ("fp16", 0, False), ("fp16", 2, False), ("fp32", 3, False)])
def test_a_state_of_eight_bits(attach, low_rank, kind):
    plain = engine_of(kind, low_rank, optimizer_of=EightBit, gradient_clipping=0.0)
    train(plain, range(1, 4))
    engine = engine_of(kind, low_rank, optimizer_of=EightBit, gradient_clipping=0.0)
    guard = attach(engine)
    train(engine, range(1, 4))
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(engine).items())
    train(engine, [4], bad=4)
    assert guard.last_report.verdict == "input_nonfinite"
    said = [finding.message for finding in guard.findings]
    names = ["down.weight", "up.weight"] if kind[1] == 0 else ["the flat parameters"]
    listed = ", ".join(f"state1 of {name}" for name in names)
    if kind[0] == "fp16" and kind[1] == 0:  # which makes the state at once
        assert said == [INTEGERS.replace("3", "5").replace("base.mask", "base.mask and 2 more")]
    elif len(names) == 1:
        assert said == [INTEGERS, f"1 tensor is not checked, because they hold integers: {listed}"]
    else:
        assert said == [INTEGERS, f"2 tensors are not checked, because they hold integers: {listed}"]


class Wrapped(torch.optim.SGD):
    """Keeps a wrapper subclass beside each parameter. ZeRO 1 and 2 themselves cut every state into pieces."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter.numel() % Quantized.BLOCK == 0:
                self.state[parameter]["exp_avg"] = Quantized.of(parameter.grad)


@pytest.mark.parametrize("kind", [("fp32", 0, False), ("fp16", 0, False), ("fp32", 3, False)])
def test_a_state_of_a_wrapper_subclass(attach, low_rank, kind):
    engine = engine_of(kind, low_rank, optimizer_of=lambda groups: Wrapped(groups, lr=0.01))
    guard = attach(engine)
    train(engine, range(1, 5), bad=4)
    assert guard.last_report.verdict == "input_nonfinite"
    said = [finding.message for finding in guard.findings]
    assert said[0] == INTEGERS
    if kind[1] > 0:
        assert said[1:] == [
            "1 tensor is not checked, because their parts are not known by parameter: exp_avg of the flat parameters"
        ]


def test_moments_of_any_strides_at_stage_0(attach):
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(8, 8)
            self.conv = nn.Conv2d(2, 3, 2)

        def forward(self, x):
            return self.conv(self.down(x).reshape(-1, 2, 2, 4))

    engine = engine_of(("fp32", 0, False), Image)
    engine.module.conv.to(memory_format=torch.channels_last)
    attach(engine)
    train(engine, range(1, 4))
    assert not engine.optimizer.state[engine.module.conv.weight]["exp_avg"].is_contiguous()
    ng.inject(engine, "optimizer_state", where="conv.weight", index=(2, 1, 0, 1), step=1)
    with pytest.raises(ng.NumericsError) as caught:
        train(engine, range(4, 7))
    first = caught.value.report.first
    assert (first.name, first.index) == ("conv.weight", (2, 1, 0, 1))
