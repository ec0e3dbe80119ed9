"""Models of many kinds whose forward pass draws random numbers or keeps state, with their training step."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 16


def body(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


class NumpyMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = body()

    def forward(self, x):
        return self.layers(x * torch.from_numpy(np.random.rand(*x.shape) > 0.2))


class SpecAugment(NumpyMask):
    """Masks a span of features whose place comes from a generator that the module holds."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(7)
        self.torch_generator = torch.Generator().manual_seed(7)

    def forward(self, x):
        begin = int(self.generator.integers(0, WIDTH - 4))
        keep = torch.ones_like(x)
        keep[:, begin : begin + 4] = 0
        return self.layers(x * keep + 0.01 * torch.randn(x.shape, generator=self.torch_generator))


class LayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.last = nn.Linear(32, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if random.random() > 0.3:
                x = x + torch.relu(layer(x))
        return self.last(x)


class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = body()
        nn.utils.parametrizations.spectral_norm(self.layers[0])
        nn.utils.parametrizations.weight_norm(self.layers[2])

    def forward(self, x):
        return self.layers(x)


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


class RunningScale(nn.Module):
    """Divides by a running scale, written in place through `.data`, and counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layers = body()
        self.register_buffer("scale", torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.seen.append(float(x[0, 0]))
        del self.seen[:-3]
        self.scale.data.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return self.layers(x / self.scale) * (1 + 0.01 * (self.calls % 3)) + 0.001 * len(self.seen)


class FakeQuantization(nn.Module):
    def __init__(self):
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        self.first = nn.Linear(WIDTH, 32)
        self.quantize = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.last = nn.Linear(32, 1)

    def forward(self, x):
        return self.last(self.quantize(torch.relu(self.first(x)).float()))


class NoisyExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([body() for _ in range(4)])

    def forward(self, x):
        scores = self.gate(x)
        choice = (scores + torch.randn_like(scores)).argmax(-1)
        weight = scores.softmax(-1).gather(1, choice[:, None])
        made = torch.stack([expert(x) for expert in self.experts], 1)
        return made[torch.arange(len(x)), choice] * weight


class Diffusion(nn.Module):
    """Draws its own timesteps and noise, and returns its loss inside of an object."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH + 1, 32), nn.ReLU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        time, noise = torch.rand(len(x), 1), torch.randn_like(x)
        made = self.layers(torch.cat([x * (1 - time) + noise * time, time], 1))
        return Prediction(made, noise)


class Prediction:
    def __init__(self, made, wanted):
        self.made = made
        self.wanted = wanted


class Checkpointed(Dropout):
    def __init__(self):
        super().__init__()
        self.reentrant = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Tanh())

    def forward(self, x):
        x = checkpoint(self.reentrant, x.requires_grad_(), use_reentrant=True)
        return checkpoint(self.layers, x, use_reentrant=False)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "dropout": Dropout,
    "numpy mask": NumpyMask,
    "SpecAugment": SpecAugment,
    "LayerDrop": LayerDrop,
    "spectral and weight norm": SpectralNorm,
    "BatchNorm": BatchNorm,
    "running scale": RunningScale,
    "fake quantization": FakeQuantization,
    "noisy experts": NoisyExperts,
    "diffusion": Diffusion,
    "checkpointed": Checkpointed,
}


def seed() -> None:
    """Sets all global generators."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True)


def loss_of(output: object, target: torch.Tensor) -> torch.Tensor:
    """A loss that overflows at the scales that a GradScaler begins with."""
    if isinstance(output, Prediction):
        return F.mse_loss(output.made.float(), output.wanted.float()) * 30
    return F.mse_loss(output.float(), target) * 30


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that the guard must leave alone: weights, buffers, attributes and all generators."""
    attributes = {
        f"{name}.{key}": value
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (int, float, bool, str, list)) and not key.startswith("_")
    }
    generators = [
        str(vars(part)["generator"].bit_generator.state) for part in model.modules() if "generator" in vars(part)
    ]
    return {
        **{name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        **attributes,
        "generators": generators,
        "torch": torch.get_rng_state(),
        "python": str(random.getstate()),
        "numpy": str(np.random.get_state()[1].tolist()),
    }


def differences(left: dict[str, object], right: dict[str, object]) -> list[str]:
    """Names of what is not the same bits."""
    assert left.keys() == right.keys()
    return [
        name
        for name in left
        if not (
            torch.equal(left[name], right[name]) if isinstance(left[name], torch.Tensor) else left[name] == right[name]
        )
    ]
