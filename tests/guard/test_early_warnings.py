"""What the guard notices before anything overflows: each rule with a run that breaks it, and clean runs that do not."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard.step.early_warnings import Spikes


def make_optimizer(model=None, lr=1e-3):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=lr), model)


def step(optimizer, loss):
    optimizer.watch_loss(loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model, optimizer, steps, scale=lambda number: 1.0):
    for number in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        step(optimizer, (model(x) - x.sum(1, keepdim=True)).square().mean() * scale(number))


def kinds(optimizer):
    return [(finding.kind, finding.name, finding.step) for finding in optimizer.findings]


def test_a_clean_run_finds_nothing_in_2000_steps():
    model, optimizer = make_optimizer()
    train(model, optimizer, 2000)
    assert optimizer.findings == []
    assert optimizer.last_report is None


def test_a_spike_of_loss_and_norm_is_found_once():
    model, optimizer = make_optimizer()
    train(model, optimizer, 60, scale=lambda number: 300.0 if number in (40, 41) else 1.0)
    assert {kind for kind, *_ in kinds(optimizer)} == {"norm_spike", "loss_spike"}
    assert [number for *_, number in kinds(optimizer)] == [41, 41], "steps count from 1, and the same is not said twice"
    assert "where the median of the steps before is" in str(optimizer.findings[0])


def test_spikes_know_a_noisy_figure_from_a_quiet_one():
    chance = random.Random(0)
    noisy = Spikes(min_deviation=0.1)
    assert not any(noisy.median_before(chance.lognormvariate(0, 1.5)) for _ in range(5000))
    signed = Spikes(min_deviation=0.05)
    assert not any(signed.median_before(chance.gauss(0, 3)) for _ in range(5000))
    assert signed.median_before(100.0) is not None
    quiet = Spikes(min_deviation=0.05)
    assert not any(quiet.median_before(chance.lognormvariate(0, 0.01)) for _ in range(50))
    assert quiet.median_before(4.0) == pytest.approx(1.0, rel=0.02)
    assert quiet.median_before(float("inf")) is None, "overflows are for reports"


def test_a_learning_rate_too_high():
    model, optimizer = make_optimizer(lr=0.5)
    train(model, optimizer, 4)
    finding = next(item for item in optimizer.findings if item.kind == "update_ratio")
    assert finding.step == 1
    assert finding.name in ("0.weight", "2.weight")
    assert "the learning rate is too high" in finding.message


class Dead(nn.Module):
    """The hidden layer's ReLU never opens."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.output = nn.Linear(8, 1)
        nn.init.constant_(self.hidden.bias, -1e3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.relu(self.hidden(x)))


def test_a_dead_layer():
    model, optimizer = make_optimizer(Dead())
    train(model, optimizer, 20)
    assert [item for item in kinds(optimizer) if item[0] == "dead_gradient"] == [
        ("dead_gradient", "hidden", 8),
        ("dead_gradient", "output.weight", 8),  # its input is zero
    ]
    message, _ = [item.message for item in optimizer.findings if item.kind == "dead_gradient"]
    assert message == "step 8: 2 parameters of hidden had gradients of zero throughout in steps 1, 2, 4, 8"


class Reference(nn.Module):
    """A part whose output nothing reads takes part with weight 0."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.up_blocks = nn.ModuleList(
            nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.LayerNorm(4)))) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.down_blocks, self.up_blocks[0]):
            x = x + block(x)
        return x + self.up_blocks[1](x) * 0.0


class WithReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reference_unet = Reference()
        self.output = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.reference_unet(x))


def test_findings_of_a_kind_are_one_line_a_module():
    model, optimizer = make_optimizer(WithReference())
    train(model, optimizer, 300)
    assert [(item.name, item.message) for item in optimizer.findings if item.kind == "dead_gradient"] == [
        (
            "reference_unet.up_blocks.1",
            "step 8: 20 parameters of reference_unet.up_blocks.1 had gradients of zero throughout in steps 1, 2, 4, 8",
        )
    ]


def test_a_layer_in_every_block_is_one_line():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Dead() for _ in range(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x) for layer in self.layers)

    model, optimizer = make_optimizer(Blocks())
    train(model, optimizer, 10)
    assert [item for item in kinds(optimizer) if item[0] == "dead_gradient"] == [("dead_gradient", "layers", 8)]
    assert "36 parameters of layers" in next(
        item.message for item in optimizer.findings if item.kind == "dead_gradient"
    )


class Lora(nn.Module):
    """A frozen layer with a low-rank addition whose second factor begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_a = nn.Linear(4, 2, bias=False)
        self.lora_b = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 1)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x) + self.lora_b(self.lora_a(x)))


class AdaLnZero(nn.Module):
    """A block behind a gate, before an output that begins at zero too: gradients reach it in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.final = nn.Linear(4, 1)
        for layer in (self.modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final(x + self.modulation(x) * self.block(x))


class TakesNoPart(nn.Module):
    """A mask token, a table of embeddings and a norm's weight that no step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mask_tokens = nn.Parameter(torch.zeros(3, 4))
        self.types = nn.Embedding(3, 4)
        self.unused_norm = nn.LayerNorm(4)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unread = sum(parameter.sum() for name, parameter in self.named_parameters() if not name.startswith("layer"))
        return self.layer(x) + 0.0 * unread


class LayerDrop(nn.Module):
    """Layers that most steps leave out: the last one takes part in step 3 only, of the first ten."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 1)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for number, layer in enumerate(self.layers):
            keep = float(self.calls % 3 == 0 if number == 2 else self.calls < 2 or number == 0)
            x = x + keep * torch.tanh(layer(x))
        return self.head(x)


class Experts(nn.Module):
    """One of the experts gets no token in the first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) * float(number < 3) for number, expert in enumerate(self.experts))


@pytest.mark.parametrize("kind", [Lora, AdaLnZero, TakesNoPart, LayerDrop, Experts])
@pytest.mark.parametrize("warmup", [1, 100])
def test_what_takes_no_part_or_not_yet_is_not_dead(kind, warmup):
    model, optimizer = make_optimizer(kind())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer._optimizer, lambda number: min(1.0, (number + 1) / warmup))
    for _ in range(70):
        train(model, optimizer, 1)
        schedule.step()
    assert [item for item in kinds(optimizer) if item[0] != "lost_update"] == []


def test_layers_that_explode_together_are_one_line():
    model, optimizer = make_optimizer()
    train(model, optimizer, 15)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 1e5)
    train(model, optimizer, 1)
    (found,) = [item for item in optimizer.findings if item.kind == "exploding_gradient"]
    assert found.name == ""
    assert found.message.endswith("4 parameters of the model are as far from theirs")


def test_bad_weights_of_a_module_are_one_line():
    model = WithReference()
    with torch.no_grad():
        for parameter in model.reference_unet.up_blocks[0].parameters():
            parameter.fill_(float("nan"))
        model.output.bias.fill_(float("inf"))
    model, optimizer = make_optimizer(model)
    first, second = optimizer.findings
    assert (first.name, first.offender.name) == ("reference_unet.up_blocks.0", "reference_unet.up_blocks.0.0.weight")
    assert first.message.startswith("20 parameters of reference_unet.up_blocks.0 are not finite, the first is ")
    assert second.name == "output.bias"


def test_an_exploding_layer():
    model, optimizer = make_optimizer()
    train(model, optimizer, 15)
    model[0].weight.register_hook(lambda gradient: gradient * 1e5)
    train(model, optimizer, 2)
    assert ("exploding_gradient", "0.weight", 16) in kinds(optimizer)


def test_an_input_out_of_range():
    model, optimizer = make_optimizer()
    train(model, optimizer, 7)
    step(optimizer, model(torch.full((16, 4), 255.0)).square().mean() * 1e-4)
    found = [item for item in optimizer.findings if item.kind == "input_range"]
    assert [(item.name, item.step) for item in found] == [("input", 8)]
    assert "reaches 255" in found[0].message


def test_an_input_that_clean_steps_had_as_well_is_not_to_blame():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            known = ~torch.isnan(target)
            return (self.layer(x)[known] - target[known]).square().mean()

    model, optimizer = make_optimizer(Masked())
    target = torch.full((16, 1), float("nan"))
    target[:8] = 1.0
    for number in range(4):
        x = torch.randn(16, 4)
        if number == 3:
            x[5, 2] = float("inf")
        step(optimizer, model(x, target=target))
    report = optimizer.last_report
    assert report.verdict is ng.Verdict.INPUT_NONFINITE
    assert (report.first.kind, report.first.name, report.first.index) == ("input", "x", (5, 2))
    assert report.recoverable


@pytest.mark.parametrize(("dtype", "found_in"), [(torch.float32, 2), (torch.float16, 8)])
def test_steps_that_change_nothing(dtype, found_in):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)).to(dtype)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model)

    def clip(*_):
        for parameter in model.parameters():
            parameter.grad.zero_()  # as by a norm of Inf

    hook = optimizer._optimizer.register_step_pre_hook(clip)
    for number in range(10):
        step(optimizer, model(torch.ones(16, 4, dtype=dtype) * (number + 1)).float().square().mean())
    hook.remove()
    assert kinds(optimizer) == [("lost_update", "", found_in)]
    assert "clipping (a norm of Inf makes every gradient 0)" in str(optimizer.findings[0])


def test_a_warm_up_that_begins_at_zero_is_no_finding():
    model, optimizer = make_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer._optimizer, lambda number: number / 100)
    for number in range(20):
        train(model, optimizer, 1, scale=lambda _, number=number: 1 + 0.01 * number)
        schedule.step()
    assert optimizer.findings == []


def without_learning(steps):
    """As DeepSpeed's WarmupLR, whose first two steps have a learning rate of 0; it stays there for `steps`."""
    model, optimizer = make_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer._optimizer, lambda number: float(number >= steps))
    for number in range(20):
        train(model, optimizer, 1, scale=lambda _, number=number: 1 + 0.01 * number)
        schedule.step()
    return optimizer


def test_a_learning_rate_of_zero_is_a_finding_where_it_stays():
    assert without_learning(steps=2).findings == []
    optimizer = without_learning(steps=20)
    assert [(kind, number) for kind, _, number in kinds(optimizer)] == [("lost_update", 8)]
    assert "steps 1, 2, 4, 8 were applied, and changed no weight: the learning rate is 0" in str(optimizer.findings[0])


def test_weights_of_norms_that_bfloat16_cannot_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)).bfloat16()
    model, optimizer = make_optimizer(model, lr=1e-4)
    for number in range(10):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number)).bfloat16()
        step(optimizer, (model(x) - x.sum(1, keepdim=True)).float().square().mean())
    assert [(kind, number) for kind, _, number in kinds(optimizer)] == [("lost_update", 8)]
    assert "1.weight" in str(optimizer.findings[0])
    assert "smaller than what bfloat16 can add to them" in str(optimizer.findings[0])


def test_a_bad_step_that_was_applied_all_the_same_is_told():
    model, optimizer = make_optimizer()
    train(model, optimizer, 2)
    (model(torch.full((2, 4), float("nan"))).sum()).backward()
    assert optimizer._guard.check().bad
    optimizer._guard.done(applied=True)  # as where a framework decides by itself, and makes the step
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert ("bad_step_applied", "", 3) in kinds(optimizer)
