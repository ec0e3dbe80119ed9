"""The ways in which real models make NaN of finite numbers: in the forward pass, or in the backward only."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

import deepspeed_support

WIDTH = 16
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """Something of a projection of the input: a sound function, or once `broken` is set another."""

    def __init__(self, sound: Function, faulty: Function) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.sound, self.faulty = sound, faulty
        self.broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.faulty if self.broken else self.sound)(x, self.project(x))


def attention(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return (query @ x.transpose(-1, -2) / math.sqrt(WIDTH)).softmax(-1) @ x


def attention_by_hand(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """As old code has it: the exponential of 89 is Inf in float32, that of 12 in half precision."""
    exponentials = ((query @ x.transpose(-1, -2) / math.sqrt(WIDTH)).abs() + 700.0).exp()
    return exponentials / exponentials.sum(-1, keepdim=True) @ x


def norm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(y, (WIDTH,))


def norm_of_equals(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Without the small number under the root, where every deviation is zero."""
    return (y - y) / (y - y).square().mean(-1, keepdim=True).sqrt()


def gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.sigmoid() * x


def log_of_negatives(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.log(-y.abs() - 1)


def projection(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y


def root_of_zero(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Its value is fine, its derivative is not."""
    return y + (y - y).sqrt()


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def wrong_derivative(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return Wrong.apply(y)


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)
        self.attention = Layer(attention, attention_by_hand)
        self.norm = Layer(norm, norm_of_equals)
        self.gate = Layer(gate, log_of_negatives)
        self.root = Layer(projection, root_of_zero)
        self.custom = Layer(projection, wrong_derivative)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for part in (self.attention, self.norm, self.gate, self.root, self.custom):
            x = x + part(x)
        return self.head(x)


# The layer that is broken, the name that must be found (a module, or of a weight its own), and in which pass.
FAULTS = {
    "attention": ("attention", "attention", "forward"),
    "norm": ("norm", "norm", "forward"),
    "log": ("gate", "gate", "forward"),
    "embedding row": ("", "embedding.weight", "forward"),
    "square root at 0": ("root", "root", "backward"),
    "autograd function": ("custom", "custom", "backward"),
}


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(0, 8, (4, 6), generator=torch.Generator().manual_seed(step))


STAGES = [("fp16", 0), ("fp16", 2), ("fp16", 3), ("bf16", 2)]


def damage(engine_or_model, fault):
    """Turns a fault on, in an engine or in a bare model."""
    layer, _, _ = FAULTS[fault]
    model = getattr(engine_or_model, "module", engine_or_model)
    if layer:
        model.get_submodule(layer).broken = True
    elif model is engine_or_model:
        with torch.no_grad():
            model.embedding.weight[3] = float("nan")
    else:
        deepspeed_support.plant(engine_or_model, "embedding.weight", (3, 0))


def train(engine, step):
    batch = tokens(step)
    loss = torch.nn.functional.cross_entropy(engine(batch).float().flatten(0, 1), batch.flatten())
    engine.backward(loss)
    engine.step()
