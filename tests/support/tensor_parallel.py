"""Models that are cut over pairs of ranks: by AutoTP, and by a client's own layers."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_support as support

PARTS = 2


def autotp(column: str, row: str) -> dict[str, Any]:
    """DeepSpeed's configuration that cuts one layer by columns and the next one by rows, given patterns of weights."""
    specs = [{"patterns": [pattern], "partition_type": kind} for pattern, kind in ((column, "column"), (row, "row"))]
    return {"autotp_size": PARTS, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


AUTOTP = autotp(r".*hidden\.weight$", r".*output\.weight$")


class Model(nn.Module):
    """A residual block between tied ends; `hidden` is cut by rows of its weight, `output` by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.hidden = nn.Linear(16, 24)
        self.output = nn.Linear(24, 16)
        self.head = nn.Linear(16, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.output(torch.tanh(self.hidden(x))))


class Groups:
    """What Megatron calls an mpu: neighbouring ranks hold the parts of one copy of the model."""

    def __init__(self) -> None:
        self.rank, world = dist.get_rank(), dist.get_world_size()
        cut = [list(range(begin, begin + PARTS)) for begin in range(0, world, PARTS)]
        copies = [list(range(part, world, PARTS)) for part in range(PARTS)]
        self._of_model, self._of_data = ([dist.new_group(ranks) for ranks in kind] for kind in (cut, copies))

    def get_model_parallel_rank(self) -> int:
        return self.rank % PARTS

    def get_model_parallel_world_size(self) -> int:
        return PARTS

    def get_model_parallel_group(self) -> Any:
        return self._of_model[self.rank // PARTS]

    def get_data_parallel_rank(self) -> int:
        return self.rank // PARTS

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size() // PARTS

    def get_data_parallel_group(self) -> Any:
        return self._of_data[self.rank % PARTS]


class _Sum(torch.autograd.Function):
    """Adds up over a group: in the forward pass, or in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, is_forward: bool) -> torch.Tensor:
        ctx.group = None if is_forward else group
        return _summed(x, group) if is_forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient if ctx.group is None else _summed(gradient, ctx.group), None, None


def _summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


class ClientModel(nn.Module):
    """The same block with hand-made layers of the client."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.group = groups.get_model_parallel_group()
        self.embedding = nn.Embedding(8, 16)
        self.hidden = nn.Linear(16, 24 // PARTS)
        self.output = nn.Linear(24 // PARTS, 16, bias=False)
        self.head = nn.Linear(16, 8, bias=False)
        generator = torch.Generator().manual_seed(groups.get_model_parallel_rank())
        for layer, dimension in ((self.hidden, 0), (self.output, 1)):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.1, generator=generator)
                parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = (
                    True,
                    dimension,
                    1,
                )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        hidden = torch.tanh(self.hidden(_Sum.apply(x, self.group, False)))
        return self.head(x + _Sum.apply(self.output(hidden), self.group, True))


class Regression(nn.Module):
    """A model of numbers with a loss; the layers that are cut have the names of those of `Model`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.output = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.output(torch.tanh(self.hidden(hidden))).float().square().mean()


def make_engine(
    setup: str, stage: int, groups: Groups | None = None, model: nn.Module | None = None, **config: Any
) -> Any:
    """Returns an engine of a model that is cut: by AutoTP, or by a client whose `groups` these are."""
    torch.manual_seed(0)
    model = model or (Model() if groups is None else ClientModel(groups))
    if groups is None:
        config["tensor_parallel"] = AUTOTP
        model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup[:4], torch.float32))
    return support.make_engine(setup, stage=stage, model=model, mpu=groups, **config)


def train_step(engine: Any, step: int) -> float:
    """One step; the ranks of a copy have the same batch."""
    copy = int(os.environ["RANK"]) // PARTS
    tokens = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(step + 100 * copy))
    loss = nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
    engine.backward(loss)
    engine.step()
    return loss.item()
