"""The ways in which real models make NaN of finite numbers: in the forward pass, or in the backward only."""

from __future__ import annotations

import math

import torch
from torch import nn

import deepspeed_support

WIDTH = 16


class Attention(nn.Module):
    """Softmax by hand, as old code has it: the exponential of a large logit is Inf in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.large = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ x.transpose(-1, -2) / math.sqrt(WIDTH)
        if self.large:
            scores = scores.abs() + 700.0  # the exponential of 89 is Inf in float32, that of 12 in half precision
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True) if self.large else scores.softmax(-1)
        return weights @ x


class Norm(nn.Module):
    """Without the small number under the root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bare = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bare:
            x = x.mean(-1, keepdim=True).expand_as(x)  # the same numbers everywhere: a deviation of zero
            return (x - x[..., :1]) / (x - x[..., :1]).square().mean(-1, keepdim=True).sqrt() * self.weight
        return nn.functional.layer_norm(x, (WIDTH,)) * self.weight


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.negative = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        return torch.log(-y.abs() - 1) if self.negative else y.sigmoid() * x


class Root(nn.Module):
    """A square root at 0: its value is fine, its derivative is not."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.at_zero = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        return y + (y - y).sqrt() if self.at_zero else y


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.wrong = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        return Wrong.apply(y) if self.wrong else y


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, WIDTH)
        self.attention = Attention()
        self.norm = Norm()
        self.gate = Gate()
        self.root = Root()
        self.custom = Custom()
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for part in (self.attention, self.norm, self.gate, self.root, self.custom):
            x = x + part(x)
        return self.head(x)


# The switch, the name that must be found (a module, or of a weight its own), and in which pass.
FAULTS = {
    "attention": ("attention.large", "attention", "forward"),
    "norm": ("norm.bare", "norm", "forward"),
    "log": ("gate.negative", "gate", "forward"),
    "embedding row": ("", "embedding.weight", "forward"),
    "square root at 0": ("root.at_zero", "root", "backward"),
    "autograd function": ("custom.wrong", "custom", "backward"),
}


def switch(model: nn.Module, path: str) -> None:
    """Turns a fault on."""
    place, _, name = path.rpartition(".")
    setattr(model.get_submodule(place), name, True)


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(0, 8, (4, 6), generator=torch.Generator().manual_seed(step))


STAGES = [("fp16", 0), ("fp16", 2), ("fp16", 3), ("bf16", 2)]


def damage(engine_or_model, fault):
    """Turns a fault on, in an engine or in a bare model."""
    path, _, _ = FAULTS[fault]
    model = getattr(engine_or_model, "module", engine_or_model)
    if path:
        switch(model, path)
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
