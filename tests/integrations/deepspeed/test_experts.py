"""Mixture of experts: each rank holds other experts, which reports name by their global numbers."""

from __future__ import annotations

from engine_ranks import run_engines

SCRIPT = """
from torch import nn
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

WARN = ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000)
EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.is_bad, self.is_bad_for_rank_0 = nn.Linear(16, 24), nn.Linear(24, 16), False, False

    def forward(self, x):
        y = torch.tanh(self.up(x))
        if self.is_bad_for_rank_0:
            y = torch.cat([(y[:1] * 0 - 1).sqrt(), y[1:]])
        return self.down((y * 0 - 1).sqrt() if self.is_bad else y)


class Model(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.moe = MoE(16, Expert(), num_experts=4, ep_size=parts, use_rts=False)
        self.head = nn.Linear(16, 8)

    def forward(self, tokens):
        x = self.embedding(tokens)
        y, balance, _ = self.moe(x)
        return self.head(x + y), balance


def groups_of(model):
    return split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})


def step(engine, number):
    tokens = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(number + 100 * RANK))
    output, balance = engine(tokens)
    loss = nn.functional.cross_entropy(output.float().flatten(0, 1), tokens.flatten()) + 0.01 * balance.float()
    engine.backward(loss)
    engine.step()
    return loss.item()


for setup, stage, parts in CASES:
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        engines.append(support.make_engine(
            setup, stage=stage, model=Model(parts), groups_of=groups_of, gradient_clipping=0.1
        ))
    guard, case = ng.attach(engines[0], ng.GuardConfig(policy=WARN)), (setup, stage, parts)
    for number in range(3):
        losses = [step(engine, number) for engine in engines]
        assert losses[0] == losses[1], (case, number, losses)
        if stage > 0:
            norms = float(guard.grad_norm), float(engines[0].get_global_grad_norm())
            assert abs(norms[0] / norms[1] - 1) < 1e-3, (case, number, norms)
    assert guard.last_report is None and guard.findings == [], case

    mine, whose = engines[0].module.moe.deepspeed_moe.experts.deepspeed_experts[1], 1 if parts == 1 else 3
    name, rank = f"{EXPERTS}.{whose}", None if parts == 1 else 1
    if parts == 2:  # only the other rank has a bad loss: what it was sent was made here
        used = engines[0].module.moe.deepspeed_moe.experts.deepspeed_experts[0]
        used.is_bad_for_rank_0 = RANK == 1
        loss = step(engines[0], 3)
        used.is_bad_for_rank_0 = False
        report = guard.last_report
        assert (loss == loss) == (RANK == 1), (case, loss)
        assert (report.step, report.verdict) == (4, "forward_nonfinite") and "sqrt" in report.first.operation, report
        assert (report.first.module, report.first.rank) == (f"{EXPERTS}.2", 1), (case, report)
    handle = mine.up.weight.register_hook(plant_in_gradient((3, 2))) if RANK == 1 else None
    step(engines[0], 3)
    if handle is not None:
        handle.remove()
    first = guard.last_report.first
    assert (first.name, first.rank, first.nan) == (f"{name}.up.weight", rank, 1), (case, guard.last_report)
    assert (first.index, first.shape) == ((3, 2), (24, 16)), (case, first)

    mine.is_bad = RANK == 1
    step(engines[0], 4)
    mine.is_bad = False
    report = guard.last_report
    assert report.verdict == "forward_nonfinite" and "sqrt" in report.first.operation, report
    assert report.first.module == name, (case, report)

    step(engines[0], 5)
    assert guard.last_report.step == report.step, case
    if RANK == 1:
        mine.down.weight.data[5, 7] = torch.nan
    step(engines[0], 6)
    report = guard.last_report
    assert (report.verdict, report.first.rank) == ("weights_nonfinite", 1), (case, report)
    assert (report.first.name, report.first.index) == (f"{name}.down.weight", (5, 7)), (case, report)
    guard.detach()
"""


def test_experts_are_named_by_their_global_numbers():
    run_engines(f"CASES = [('bf16', 2, 2), ('bf16_fp32', 1, 2), ('fp32', 0, 2), ('fp16', 1, 1)]{SCRIPT}")
