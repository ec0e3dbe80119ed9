"""A pipeline of two stages: tied ends, layers in between, a loss function. Faults in its layers and between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn
from torch.nn import functional

import deepspeed_support as support

RANK = int(os.environ["RANK"])
MICRO_BATCHES = 4
TIED = "tied_modules.ends.weight"


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.dropout(self.down(torch.tanh(self.up(x))), 0.1, self.training)


def transposed(tied: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The last layer, with the weight of the first."""
    return functional.linear(x, tied.weight.T)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error."""
    return functional.mse_loss(output.float(), target.float())


class RootNorm(nn.Module):
    """Divides by the root of the mean square, which has no derivative at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True)) * self.weight


def make_engine(
    setup: str, stage: int, axes: Sequence[str] = ("pipe", "data"), third: type[nn.Module] = Block, **options: Any
) -> Any:
    """Returns an engine: layers 0 to 2 on its first stage, layers 3 to 5 on its second one.

    Args:
        setup, stage, options: As in `deepspeed_support.make_engine`.
        axes: Of the ranks' numbers, the one that changes most slowly first.
        third: Class of the first layer of the second stage.
    """
    support.allow_fp16()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    layers = [
        TiedLayerSpec("ends", nn.Linear, 16, 16, bias=False),
        LayerSpec(Block),
        LayerSpec(nn.LayerNorm, 16),
        LayerSpec(third),
        torch.nn.functional.softplus,
        TiedLayerSpec("ends", nn.Linear, 16, 16, bias=False, forward_fn=transposed),
    ]
    sizes = {"pipe": 2, "data": torch.distributed.get_world_size() // 2, "model": 1}
    model = PipelineModule(
        layers,
        topology=ProcessTopology(list(axes), [sizes[axis] for axis in axes]),
        loss_fn=loss_of,
        partition_method="uniform",
        activation_checkpoint_interval=options.pop("activation_checkpoint_interval", 0),
    )
    return support.make_engine(
        setup,
        stage=stage,
        model=model,
        gradient_accumulation_steps=MICRO_BATCHES,
        steps_per_print=1 << 20,
        **options,
    )


def batches(engine: Any, number: int, damage: Callable[[Any, Any], Any] | None = None) -> Iterator[Any]:
    """Yields the micro-batches of a step; `damage` changes the last one of the last copy of the pipeline."""
    copy, dtype = engine.grid.data_parallel_id, next(engine.module.parameters()).dtype
    generator = torch.Generator().manual_seed(number + 1000 * copy)
    for position in range(MICRO_BATCHES):
        x, y = torch.randn(4, 16, generator=generator).to(dtype), torch.randn(4, 16, generator=generator)
        if damage is not None and position == MICRO_BATCHES - 1 and is_last_copy(engine):
            damage(x, y)
        yield x, y


def step(engine: Any, number: int, damage: Callable[[Any, Any], Any] | None = None) -> float:
    """Makes a step; returns its loss."""
    torch.manual_seed(number + RANK)
    return float(engine.train_batch(batches(engine, number, damage)))


def is_last_copy(engine: Any) -> bool:
    """Returns whether this rank is one of the last copy of the pipeline."""
    return bool(engine.grid.data_parallel_id == engine.grid.data_parallel_size - 1)


def part_of(engine: Any, name: str) -> Any:
    """Returns a parameter or layer of this rank's stage by its name; None if another stage has it, or a lower copy."""
    if not is_last_copy(engine):
        return None
    return {**dict(engine.module.named_modules()), **dict(engine.module.named_parameters())}.get(name)


def with_layer(engine: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor], number: int) -> None:
    """Makes a step in which the output of a layer of the last copy is changed."""
    layer = part_of(engine, name)
    handle = None if layer is None else layer.register_forward_hook(lambda *call: change(call[-1]))
    step(engine, number)
    if handle is not None:
        handle.remove()


def with_hook(engine: Any, name: str, index: tuple[int, ...], number: int) -> None:
    """Makes a step in which one element of a parameter's gradient becomes NaN, on the last copy."""
    parameter = part_of(engine, name)
    handle = None if parameter is None else parameter.register_hook(support.plant_in_gradient(index))
    step(engine, number)
    if handle is not None:
        handle.remove()


def with_transfer(engine: Any, change: Callable[[torch.Tensor], Any], number: int) -> None:
    """Makes a step in which what the second stage of the last copy has received is changed in place."""
    table = engine._INSTRUCTION_MAP

    def receive(self: Any, buffer_id: int) -> None:
        table[schedule.RecvActivation](self, buffer_id)
        with torch.no_grad():
            change(self.pipe_buffers["inputs"][buffer_id])

    if is_last_copy(engine):
        engine._INSTRUCTION_MAP = {**table, schedule.RecvActivation: receive}
    step(engine, number)
    engine._INSTRUCTION_MAP = table


class Steep(torch.autograd.Function):
    """Leaves a tensor as it is, and multiplies its gradient."""

    factor = 1.0

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * Steep.factor


def steep(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that leaves a tensor as it is, and multiplies its gradient."""

    def change(x: torch.Tensor) -> torch.Tensor:
        Steep.factor = factor
        return Steep.apply(x)

    return change
