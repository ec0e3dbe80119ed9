"""`engine.offload_states` and `reload_states` between steps."""

from __future__ import annotations

import pytest
import torch

import hallo_numguard as ng

import deepspeed_support as support

pytestmark = pytest.mark.deepspeed


class Trained(support.Model):
    """Nothing is frozen: DeepSpeed's stage 3 does not take back frozen weights that it has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen.requires_grad_(True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_with_the_same_bits_and_faults_are_named(stage):
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    # Without DeepSpeed's own Adam stage 3 moves no state of the optimizer.
    moved = None if stage < 3 else [Kind.lp_params, Kind.lp_grads, Kind.contiguous_grad_buffer]

    def train(engine):
        losses = []
        for step in range(3):
            losses.append(support.train_step(engine, step))
            engine.offload_states(include=moved)
            engine.reload_states()
        return losses

    torch.manual_seed(0)
    alone = train(support.make_engine("bf16", stage=stage, model=Trained()))
    torch.manual_seed(0)
    engine = support.make_engine("bf16", stage=stage, model=Trained())
    guard = ng.attach(engine)
    assert train(engine) == alone
    assert (guard.last_report, guard.findings) == (None, [])
    support.plant(engine, "hidden.weight", (3, 5))
    with pytest.raises(ng.NumericsError):
        support.train_step(engine, 4)
    assert (guard.last_report.first.name, guard.last_report.first.index) == ("hidden.weight", (3, 5))
    guard.detach()
