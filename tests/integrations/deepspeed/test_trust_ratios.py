"""An optimizer that multiplies its update by a ratio of norms, as LAMB: one bad element makes all of a tensor bad."""

from __future__ import annotations

import pytest
import torch

import deepspeed_support as support
from campaign.cases import Case, problems

pytestmark = pytest.mark.deepspeed


class TrustRatio(torch.optim.Optimizer):
    """Momentum, scaled by the norm of the weights over that of the update."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(0.9).add_(weight.grad)
                weight.sub_(momentum * (group["lr"] * weight.norm() / momentum.norm().clamp(min=1e-6)))


@pytest.mark.parametrize(("setup", "stage"), [("fp16", 0), ("fp16", 2), ("bf16", 3)])
def test_the_bad_moment_is_named_and_not_the_first_weight_that_it_has_spoilt(setup, stage):
    support.single_process_environment()
    support.allow_fp16()
    from campaign import worker  # which asks for the rank

    case = Case("optimizer_state", "transformer", setup, stage, False, 1)
    assert problems(case, [worker.run(case, optimizer_of=TrustRatio)]) == []
