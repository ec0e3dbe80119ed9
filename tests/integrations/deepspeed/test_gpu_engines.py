"""Engines on a GPU: `DS_ACCELERATOR=cuda pytest tests/integrations/deepspeed` runs these, and all others there."""

from __future__ import annotations

import pytest
import torch

import hallo_numguard as ng

import deepspeed_support as support
from deepspeed_support import KINDS, name_of
from gpu import NEEDS_GPU, host_syncs

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(support.DEVICE.type == "cpu", reason="DeepSpeed runs on the CPU: set DS_ACCELERATOR=cuda"),
]


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["replace", "observe"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_guard_never_waits_for_the_gpu(attach, kind, mode, clipping):
    setup, stage, offload, _ = kind
    waits = {}
    for guarded in (False, True):
        engine = support.make_engine(setup, stage=stage, offload=offload, gradient_clipping=clipping)
        guard = attach(engine, ng.GuardConfig(mode=mode)) if guarded else None
        for step in range(6):  # the first steps look at all weights
            support.train_step(engine, step)
        with host_syncs() as waited:
            for step in range(4):
                support.train_step(engine, step)
        waits[guarded] = [f"{warning.filename}:{warning.lineno}" for warning in waited]
        assert guard is None or len(guard.history) == 10
    ours = [place for place in waits[True] if "hallo_numguard" in place]
    assert len(waits[True]) <= len(waits[False]), (ours, waits)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_that_the_host_runs_ahead_of_are_those_of_an_unguarded_run(attach, stage):
    """A flag that is read before it is written would skip steps: the GPU is kept busy before each."""
    losses = {}
    for guarded in (False, True):
        engine = support.make_engine("fp16", stage=stage, gradient_clipping=0.0)
        guard = attach(engine) if guarded else None
        losses[guarded] = []
        for step in range(12):
            torch.cuda._sleep(20_000_000)
            losses[guarded].append(support.train_step(engine, step))
        assert guard is None or all(record.applied for record in guard.history)
    assert losses[True] == losses[False]
