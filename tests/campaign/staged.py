"""The campaign's transformer as a pipeline of two stages, and a step of it."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn
from torch.nn import functional

from campaign.cases import FAULTY_STEP, MICRO_BATCHES, STAGES, Case
from campaign.faults import INPUT
from campaign.models import Block, Transformer, Trap


class Features(nn.Module):
    """Adds projected features and positions to embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 16).requires_grad_(False)
        self.register_buffer("positions", torch.linspace(-1, 1, 6)[:, None].repeat(1, 16))

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, features = given
        return x + self.projection(features) + self.positions.to(features.dtype)


class Causal(Block):
    """A block of the transformer with the mask that it needs."""

    def __init__(self) -> None:
        super().__init__(16)
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, self.mask)


def _embedded(ends: nn.Embedding, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return ends(given[0]), given[1]


def _logits(ends: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, ends.weight)


class StagedTransformer(PipelineModule):
    """Layers 0 to 3 are on the first stage; the embedding is tied, the projection of features frozen."""

    trainable = "4.mlp.0.weight"  # on the last stage
    frozen = "1.projection.weight"
    buffer = "1.positions"
    module = "4.mlp.0"
    trapped = "3"
    shapes: ClassVar = {trainable: (32, 16), frozen: (16, 6)}  # for ranks of the other stage too

    def __init__(self) -> None:
        deepspeed.init_distributed("gloo", verbose=False)
        layers = [
            TiedLayerSpec("ends", nn.Embedding, 16, 16, forward_fn=_embedded),
            LayerSpec(Features),
            LayerSpec(Causal),
            LayerSpec(Trap),
            LayerSpec(Causal),
            LayerSpec(nn.LayerNorm, 16),
            TiedLayerSpec("ends", nn.Embedding, 16, 16, forward_fn=_logits),
        ]
        copies = torch.distributed.get_world_size() // STAGES
        topology = PipeDataParallelTopology(num_pp=STAGES, num_dp=copies)
        super().__init__(layers, topology=topology, loss_fn=Transformer.loss, partition_method="uniform")

    @property
    def trap(self) -> Trap:
        """The layer in which gradients become NaN; on other stages one that nothing calls."""
        return next((layer for layer in self.modules() if isinstance(layer, Trap)), Trap())


def train(case: Case, engine: Any, step: int, batch: int) -> float:
    """Makes a step; its last micro-batch has the fault, where that is none of the weights. Returns its loss."""
    batches = _batches(engine, batch)
    if step == FAULTY_STEP and engine.global_rank == case.culprit:
        (_, features), target = batches[-1]
        if case.fault == "input":
            features[INPUT[case.model][1]] = float("nan")
        if case.fault == "loss":
            engine.module.loss_fn = functools.partial(_infinite_for, target)
    loss = float(engine.train_batch(iter(batches)))
    engine.module.loss_fn = Transformer.loss
    return loss


def _infinite_for(bad: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return Transformer.loss(output, target) * (float("inf") if torch.equal(target, bad) else 1.0)


def _batches(engine: Any, number: int) -> list[Any]:
    """The micro-batches of a step. Both stages of a copy read them: the first one the batch, the last one labels."""
    generator = torch.Generator().manual_seed(number + 1000 * engine.grid.data_parallel_id)
    return [Transformer.batch(generator, next(engine.module.parameters()).dtype) for _ in range(MICRO_BATCHES)]
