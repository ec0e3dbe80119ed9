"""Frozen modules outside of the model that feed it: scanned, watched, and named where they make a non-finite value."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from engine_ranks import run_engines
from torch import nn

import hallo_numguard as ng

from deepspeed_support import run_ranks

QUIET = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=100))


class Encoder(nn.Module):
    """Called by its method `encode`, never as a whole; its first block overflows in float16."""

    def __init__(self, dtype=torch.float16) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([nn.Linear(4, 16), nn.Linear(16, 4)])
        self.norm = nn.LayerNorm(4)
        with torch.no_grad():
            self.blocks[0].weight.fill_(1e3)
            self.blocks[1].weight.mul_(1e2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.requires_grad_(False).to(dtype)

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Reward(nn.Module):
    """Its output goes into the loss, and not into the model."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1).requires_grad_(False)

    def forward(self, x):
        return (self.score(x) * 0).log().sum() * 0


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, torch.optim.SGD(model.parameters(), lr=1e-2)


def train(optimizer, model, encoder, steps=3, size=100.0, extra=lambda out: 0.0):
    for step in range(steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) + size
        with torch.no_grad():
            latents = encoder.encode(x.to(encoder.norm.weight.dtype)).float()
        out = model(latents)
        loss = out.square().mean() + extra(out)
        optimizer.watch_loss(loss).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("also", "name"), [("list", "Encoder"), ("mapping", "vae")])
def test_the_part_inside_that_overflows_is_named(also, name):
    encoder = Encoder()
    model, plain = model_and_optimizer()
    given = {"vae": encoder} if also == "mapping" else [encoder]
    optimizer = ng.GuardedOptimizer(plain, model, QUIET, also=given)
    assert optimizer.findings == [], "the mask is no finding"
    train(optimizer, model, encoder)
    report = optimizer.last_report
    assert (report.verdict, report.recoverable) == ("input_nonfinite", None)
    assert (report.first.kind, report.first.name, report.first.dtype) == ("activation", f"{name}.blocks.0", "float16")
    assert (report.first.operation, report.first.pos_inf) == ("aten.addmm.default", 48)
    assert "3 of its 3 samples are not finite" in report.evidence
    assert f"run {name} in float32 or bfloat16" in report.advice


def test_clean_training_is_the_same_bit_for_bit_and_nothing_is_kept():
    results = []
    for guarded in (False, True):
        encoder = Encoder(torch.float32)
        model, optimizer = model_and_optimizer()
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model, also=[encoder])
            train(optimizer, model, encoder)
            assert (optimizer.last_report, len(optimizer.history)) == (None, 3)
            assert not optimizer._guard.session._steps.pending.feeding_calls
        else:
            optimizer.watch_loss = lambda loss: loss
            train(optimizer, model, encoder)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_all_hooks_go_at_detach_and_none_stays_in_a_copy():
    encoder = Encoder()
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, also=[encoder])
    assert encoder.norm._forward_hooks
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        copied.encode(torch.ones(1, 4, dtype=torch.float16))
    assert not optimizer._guard.session._steps.pending.feeding_calls
    optimizer.detach()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in encoder.modules())


def test_calls_that_no_step_follows_keep_a_limited_memory(monkeypatch):
    monkeypatch.setattr("hallo_numguard.guard.feeding_modules.MAX_KEPT_BYTES", 10_000)
    encoder = Encoder(torch.float32)
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, also=[encoder])
    first = torch.ones(50, 4)
    seen = weakref.ref(first)
    for x in [first, *(torch.ones(50, 4) for _ in range(20))]:
        encoder.norm(x)
    del first, x
    gc.collect()
    calls = optimizer._guard.session._steps.pending.feeding_calls
    assert 0 < len(calls) <= 6
    assert seen() is None


def test_a_bad_weight_of_a_feeding_module_is_found_at_once_and_blamed():
    encoder = Encoder(torch.float32)
    encoder.norm.weight[2] = math.nan
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, also={"vae": encoder})
    assert [finding.name for finding in optimizer.findings] == ["vae.norm.weight"]
    with pytest.raises(ng.NumericsError) as caught:
        train(optimizer, model, encoder)
    assert (caught.value.report.verdict, caught.value.report.first.name) == ("weights_nonfinite", "vae.norm.weight")


def test_what_a_feeding_module_was_called_with_is_named_where_that_was_bad():
    encoder = Encoder(torch.float32)
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, QUIET, also={"vae": encoder})
    train(optimizer, model, encoder, steps=1, size=math.nan)
    report = optimizer.last_report
    assert (report.verdict, report.first.kind) == ("input_nonfinite", "input")
    assert report.first.name.startswith("vae.blocks.0: input")


def test_a_reward_model_that_spoils_the_loss_is_named():
    reward, encoder = Reward(), Encoder(torch.float32)
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, QUIET, also={"reward": reward, "vae": encoder})
    train(optimizer, model, encoder, steps=1, extra=lambda out: out.sum() * reward(out.detach()))
    report = optimizer.last_report
    assert (report.verdict, report.first.kind, report.first.name) == ("forward_nonfinite", "activation", "reward")
    assert "how what it returned reaches the loss" in report.not_checked


def test_a_compiled_encoder_is_run_again_eagerly():
    encoder = Encoder()
    compiled = torch.compile(encoder.blocks[0], backend="eager")
    encoder.encode = lambda x: encoder.norm(encoder.blocks[1](compiled(x)))
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, QUIET, also={"front": compiled})
    train(optimizer, model, encoder, steps=1)
    assert (optimizer.last_report.verdict, optimizer.last_report.first.name) == ("input_nonfinite", "front")


@pytest.mark.parametrize("also", [3, "vae", [3], {"": nn.Linear(1, 1)}, {"vae": None}, nn.Linear(1, 1)])
def test_what_is_no_module_is_refused(also):
    model, plain = model_and_optimizer()
    with pytest.raises(ng.InvalidInput, match="also must be"):
        ng.GuardedOptimizer(plain, model, also=also)


@pytest.mark.parametrize(("bad", "recoverable", "advice"), [(1, True, "Find the sample"), (3, None, "All samples are")])
def test_one_bad_sample_and_all_of_them_have_other_advice(bad, recoverable, advice):
    model, plain = model_and_optimizer()
    optimizer = ng.GuardedOptimizer(plain, model, QUIET)

    def step():
        x = torch.ones(3, 4)
        x[:bad] = math.nan
        optimizer.watch_loss(model(x).square().mean()).backward()
        optimizer.step()
        return optimizer.last_report

    report = step()
    assert (report.verdict, report.recoverable) == ("input_nonfinite", recoverable)
    assert advice in report.advice
    report = step()
    assert report.recoverable is None
    assert "in this step and in the one before: look at what made them" in report.advice


ENGINE = """
from torch import nn
encoder = nn.Linear(4, 16).requires_grad_(False)
with torch.no_grad():
    encoder.weight.fill_(3e38)
engine = support.make_engine("fp32", stage=STAGE, model=nn.Linear(16, 4))
guard = ng.attach(engine, ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=9)), also={"encoder": encoder})
for step in range(3):
    scale = 100.0 if step == 1 and RANK == 1 else 1e-38
    loss = engine(encoder(torch.ones(3, 4) * scale)).square().mean()
    engine.backward(loss)
    engine.step()
report = guard.last_report
print(report.verdict, report.first.kind, report.first.name, report.first.rank, report.step)
guard.detach()
assert not encoder._forward_hooks
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_under_deepspeed_every_rank_names_the_module_of_the_rank_that_was_bad(stage):
    for output in run_engines(ENGINE.replace("STAGE", str(stage))):
        assert "input_nonfinite activation encoder 1 2" in output, output


def test_an_encoder_that_makes_collectives_is_not_run_again_alone(tmp_path):
    script = """
import math
import torch
import torch.distributed as dist
from torch import nn
import hallo_numguard as ng

dist.init_process_group("gloo")

class Gathers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        x = self.layer(x)
        dist.all_reduce(x)
        return x * (math.inf if dist.get_rank() == 1 else 1)

torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
encoder = Gathers().requires_grad_(False)
config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=9))
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, config, also=[encoder])
for _ in range(2):
    optimizer.zero_grad()
    optimizer.watch_loss(model(encoder(torch.ones(3, 4))).square().mean()).backward()
    optimizer.step()
print(optimizer.last_report.verdict, optimizer.last_report.first.name, optimizer.last_report.first.rank)
dist.barrier()
dist.destroy_process_group()
"""
    for output in run_ranks(script, tmp_path, contains_failures=True):
        assert "input_nonfinite Gathers 1" in output, output


def test_a_bundle_of_a_fault_outside_of_the_model_has_the_batch_alone(tmp_path):
    encoder = Encoder()
    model, plain = model_and_optimizer()
    config = ng.GuardConfig(policy=QUIET.policy, repro_dir=tmp_path)
    optimizer = ng.GuardedOptimizer(plain, model, config, also={"vae": encoder})
    train(optimizer, model, encoder, steps=1)
    assert optimizer.last_report.first.name == "vae.blocks.0"
    (bundle,) = tmp_path.iterdir()
    assert (bundle / "batch.pt").exists()
    assert not (bundle / "call.pt").exists()
    assert "vae.blocks.0 is no module of the model" in (bundle / "bundle.json").read_text()
