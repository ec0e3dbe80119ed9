"""Engines that the guard refuses, as DeepSpeed makes them where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import hallo_numguard as ng

import deepspeed_support as support
from campaign.cases import Case, Seen

_CPU = {"device": "cpu"}


def attempt(case: Case) -> Seen:
    """Trains an engine without a guard, and then attaches one."""
    alone, verdict = "runs", None
    try:
        engine = _make(case.model)
        for step in range(2):
            _train(engine, step)
    except Exception as error:  # noqa: BLE001 - the table tells it
        alone = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
    else:
        try:
            ng.attach(engine)
        except ng.UnsupportedDeepSpeed as error:
            verdict = "refused" if case.model in str(error) else str(error)
    return Seen.of_refused(verdict, alone)


def _train(engine: Any, step: int) -> None:
    if engine.optimizer is None or type(engine.optimizer).__name__ == "DeepSpeedZeRoOffload":
        tokens = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(step))
        functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
    else:
        support.train_step(engine, step)


def _make(feature: str) -> Any:
    zero: dict[str, dict[str, Any]] = {
        "SuperOffload": {"stage": 3, "offload_optimizer": {**_CPU, "super_offload": True}},
        "MiCS": {"stage": 3, "mics_shard_size": 1},
    }
    if feature == "an engine without optimizer":
        support.single_process_environment()
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 4}
        engine, *_ = deepspeed.initialize(model=support.Model(), config=config)
        return engine
    if feature == "1-bit optimizers":
        from deepspeed.runtime.fp16.onebit.adam import OnebitAdam

        return support.make_engine("bf16", stage=0, optimizer_of=lambda groups: OnebitAdam(groups, lr=1e-3))
    return support.make_engine("bf16", stage=zero[feature]["stage"], zero_optimization=zero[feature])
