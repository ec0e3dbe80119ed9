"""Models with the tiled computations of ALST, which run a backward pass of their own inside of the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng

import deepspeed_support as support

WARN = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn"))
TILES = 4


class Mlp(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.fault = kind, ""
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def plain(self, x):
        y = torch.tanh(self.up(x))
        if self.fault == "forward":
            y = torch.where(y > 0.9, (y * 0 - 1).sqrt(), y)
        if self.fault == "backward":
            y = y + (y - y).sqrt()
        return self.down(y)

    def forward(self, x):
        from deepspeed.runtime.sequence_parallel import ulysses_sp

        parameters = list(self.parameters())
        if self.kind == "mlp":
            return ulysses_sp.TiledMLP.apply(Mlp.plain, self, x, TILES, parameters)
        given = {"x": x}, {"self": self}
        return ulysses_sp.sequence_tiled_compute(
            Mlp.plain, x.shape[1], TILES, *given, "x", parameters, output_reduction=None
        )


class Tiled(nn.Module):
    """Two tiled MLPs and a tiled loss."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.one, self.two, self.head = nn.Linear(6, 16), Mlp(kind), Mlp(kind), nn.Linear(16, 8)

    def forward(self, x, labels):
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        x = self.enter(x)
        x = x + self.one(x)
        x = x + self.two(x)
        parameters = list(self.head.parameters())
        return TiledFusedLogitsLoss.apply(Tiled.loss, self, x, labels, None, TILES, parameters, "mean")

    def loss(self, x, labels):
        return nn.functional.cross_entropy(self.head(x).float(), labels)


def step(engine, number, fault=""):
    generator = torch.Generator().manual_seed(number)
    x, labels = torch.randn(2, 12, 6, generator=generator), torch.randint(0, 8, (2, 12), generator=generator)
    if fault == "input":
        x[1, 3, 2] = torch.nan
    engine.module.two.fault = fault
    loss = engine(x.to(engine.device, next(engine.module.parameters()).dtype), labels.to(engine.device))
    engine.backward(loss)
    engine.step()
    engine.module.two.fault = ""
    return loss.item()


EXPECTED = {
    "input": ("input_nonfinite", "input", "x", None),
    "forward": ("forward_nonfinite", "activation", "two", "aten.sqrt.default"),
    "backward": ("backward_nonfinite", "gradient", "two", "aten.div.Tensor"),
}


def model(kind):
    torch.manual_seed(0)
    return Tiled(kind)


@pytest.mark.parametrize("kind", ["mlp", "sequence"])
@pytest.mark.parametrize(("setup", "stage"), [("bf16", 0), ("fp16", 2), ("bf16", 3)])
def test_faults_are_named_and_the_run_goes_on_as_without_a_guard(make, kind, setup, stage):
    engine, guard = make(setup, WARN, stage=stage, model=model(kind))
    alone = support.make_engine(setup, stage=stage, model=model(kind))
    for number, fault in enumerate(["", "", *EXPECTED, ""]):
        losses = [step(one, number, fault) for one in (engine, alone)]
        assert losses[0] == losses[1] or fault, (number, losses)
        if fault:
            report = guard.last_report
            first = report.first
            assert report.step == number + 1
            assert (report.verdict, first.kind, first.name, first.operation) == EXPECTED[fault], report
    assert [record.applied for record in guard.history] == [True, True, False, False, False, True]
    assert guard.findings == []
    ng.inject(engine, "parameter", "two.up.weight", index=(5, 3))
    step(engine, 7)
    assert (guard.last_report.verdict, guard.last_report.first.name) == ("weights_nonfinite", "two.up.weight")
