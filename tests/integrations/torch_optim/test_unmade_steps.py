"""Scripts that look at the norm of their gradients and make no step: explained; and gradients read before clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_ as imported_by_name

import hallo_numguard as ng
from hallo_numguard.integrations.torch_optim import clip_calls

from deepspeed_support import run_ranks

pytestmark = pytest.mark.usefixtures("cpu_alone")

NAN = float("nan")


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def batch(number, bad=False):
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
    if bad:
        data[2, 5] = NAN
    return data


def by_attribute(parameters):
    return torch.nn.utils.clip_grad_norm_(parameters, 5.0)


def by_name(parameters):
    return imported_by_name(parameters, 5.0)


def in_two_calls(parameters):
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, 5.0, norm)
    return norm


def norm_alone(parameters):
    return torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)


LOOKS = [by_attribute, by_name, in_two_calls, norm_alone]


def loop(look, clears, windows=6, size=2, bad=4, policy=None, named=False):
    """Accumulates `size` micro-batches, looks at the norm, and makes a step if it is finite."""
    model = regression()
    given = model.named_parameters() if named else model
    config = ng.GuardConfig(policy=policy or ng.Policy())
    optimizer = ng.GuardedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), given, config)
    for number in range(windows * size):
        (model(batch(number, number == bad)).square().mean() / size).backward()
        if (number + 1) % size:
            continue
        if torch.isfinite(look(model.parameters())):
            optimizer.step()
            optimizer.zero_grad()
        elif clears == "guarded":
            optimizer.zero_grad()
        elif clears == "model":
            model.zero_grad()
    return optimizer


def uncleared(optimizer):
    return [finding.step for finding in optimizer.findings if finding.kind == "gradients_not_cleared"]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("clears", ["never", "guarded", "model"])
def test_a_step_that_is_left_out_is_explained(look, clears):
    optimizer = loop(look, clears)
    report = optimizer.last_report
    assert (report.verdict, report.step) == ("input_nonfinite", 3)
    assert (report.first.name, report.first.index) == ("input", (2, 5))
    assert any("micro-batch 0" in line for line in report.evidence)
    assert uncleared(optimizer) == ([4, 5, 6] if clears == "never" else [])
    if clears != "never":
        assert [record.applied for record in optimizer.history] == [True, True, False, True, True, True]


def test_what_is_said_of_gradients_that_nobody_clears():
    findings = [one for one in loop(by_attribute, "never").findings if one.kind == "gradients_not_cleared"]
    assert "not finite before the backward pass: since step 3 they were never cleared" in findings[0].message
    assert findings[0].severity == "error"
    assert "(3 steps so far)" in findings[-1].message


def test_the_policy_ends_a_run_whose_gradients_nobody_clears():
    with pytest.raises(ng.NumericsError):
        loop(by_attribute, "never", windows=12, policy=ng.Policy(max_consecutive_skips=4))


def test_names_alone_are_enough_to_see_that_a_step_was_left_out():
    optimizer = loop(by_attribute, "never", named=True)
    assert optimizer.last_report.step == 3
    assert uncleared(optimizer) == [4, 5, 6]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("named", [False, True])
def test_a_clean_loop_is_left_alone_and_has_the_same_bits(look, named):
    optimizer = loop(look, "never", bad=None, named=named)
    assert optimizer.last_report is None
    assert uncleared(optimizer) == []
    assert [record.applied for record in optimizer.history] == [True] * 6
    model = regression()
    plain = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(12):
        (model(batch(number)).square().mean() / 2).backward()
        if number % 2:
            look(model.parameters())
            plain.step()
            plain.zero_grad()
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    assert all(torch.equal(one, other) for one, other in zip(trained, model.parameters(), strict=True))


class OneBad(torch.autograd.Function):
    """Gives one NaN in its backward pass; the loss is finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        mask = torch.ones_like(gradient)
        mask[0, 0] = 0.0
        return gradient * mask / mask


class Poisoned(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(OneBad.apply(self.body(x)))


@pytest.mark.parametrize("look", [by_attribute, by_name, in_two_calls])
def test_gradients_are_read_before_clipping_makes_all_of_them_nan(look):
    torch.manual_seed(0)
    model = Poisoned()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(batch(0)).square().mean().backward()
    look(model.parameters())
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())
    optimizer.step()
    report = optimizer.last_report
    assert {item.name for item in report.offenders} == {"body.weight", "body.bias"}
    assert {(item.name, item.nan) for item in report.offenders} == {("body.weight", 8), ("body.bias", 1)}
    assert report.verdict == "backward_nonfinite"


def test_gradients_that_other_code_has_clipped_are_not_blamed():
    torch.manual_seed(0)
    model = Poisoned()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(batch(0)).square().mean().backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    for parameter in model.parameters():
        parameter.grad.mul_(1.0 / norm)
    optimizer.step()
    assert any("as after a multiplication by a norm that is NaN" in line for line in optimizer.last_report.evidence)


def test_what_changes_gradients_after_clipping_is_seen():
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(batch(0)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    model[0].weight.grad[0, 0] = NAN
    optimizer.step()
    assert [record.applied for record in optimizer.history] == [False]
    assert optimizer.last_report.offenders[0].name == "0.weight"
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_script_that_clips_makes_one_pass_a_step_and_the_guard_clips_by_what_is_left(clip_norm):
    results = []
    for guarded in (False, True):
        model = regression()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ng.GuardedOptimizer(plain, model, clip_norm=clip_norm) if guarded else plain
        for number in range(4):
            optimizer.zero_grad()
            model(batch(number)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
            if clip_norm is not None and not guarded:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*results, strict=True))
    if clip_norm is None:
        assert optimizer.history[0].norm > 0.7  # what the gradients were before


def test_unscaled_gradients_that_are_clipped_and_dropped():
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number in range(4):
        scaler.scale(model(batch(number, number == 2)).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [record.applied for record in optimizer.history] == [True, True, False, True]
    assert optimizer.last_report.verdict == "input_nonfinite"
    assert scaler.get_scale() == 2.0**7


def test_the_patches_go_with_the_guard():
    for patch in clip_calls._patches:  # guards of other tests that nobody has detached
        for observer in list(patch._observers):
            patch.discard(observer)
    clip_grad = torch.nn.utils.clip_grad
    names = ["_get_total_norm", "_clip_grads_with_norm_", "clip_grad_norm_"]
    model = regression()
    ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model).detach()
    before = [getattr(clip_grad, name, None) for name in names]
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert [getattr(clip_grad, name, None) for name in names] != before
    optimizer.detach()
    assert [getattr(clip_grad, name, None) for name in names] == before


def test_an_accelerator_whose_script_looks_at_the_norm():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = regression()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    guard = ng.attach(accelerator)
    for number in range(6):
        accelerator.backward(model(batch(number, number == 2)).square().mean())
        if math.isfinite(accelerator.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
            optimizer.zero_grad()
    assert (guard.last_report.verdict, guard.last_report.step) == ("input_nonfinite", 3)
    assert uncleared(guard) == [4, 5, 6]


RANKS = """
import logging
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import hallo_numguard as ng

logging.disable(logging.CRITICAL)
dist.init_process_group("gloo")
RANK = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
wrapped = DistributedDataParallel(model)
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), wrapped)
for step in range(1, 7):
    x = torch.randn(4, 8)
    if (step, RANK) == (3, 1):
        x[2, 5] = float("nan")
    wrapped(x).square().mean().backward()
    if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
        optimizer.step()
        optimizer.zero_grad()
report = optimizer.last_report
assert (report.verdict, report.step, report.first.rank) == ("input_nonfinite", 3, 1), report
found = [finding.step for finding in optimizer.findings if finding.kind == "gradients_not_cleared"]
assert found == [4, 5, 6], found
"""


def test_two_ranks_that_leave_a_step_out(tmp_path):
    run_ranks(RANKS, tmp_path)
