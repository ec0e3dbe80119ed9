"""Tensors that no kernel reads as they are: frozen integers, wrapper subclasses, and optimizers whose state is such."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Quantized(torch.Tensor):
    """int8 codes and one float32 scale for each block of them, as libraries of 8-bit optimizers keep their state."""

    BLOCK = 4

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.shape

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], shape: Any, *_: Any) -> Quantized:
        return cls(inner["codes"], inner["scale"], shape)

    @classmethod
    def of(cls, values: torch.Tensor) -> Quantized:
        """Returns the quantized values, of which there is a multiple of `BLOCK`."""
        blocks = values.detach().float().reshape(-1, cls.BLOCK)
        scale = blocks.abs().amax(dim=1).clamp(min=1e-12) / 127
        return cls((blocks / scale[:, None]).round().to(torch.int8), scale, values.shape)

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]  # torch's is not meant
        """Returns the values."""
        return (self.codes.float() * self.scale[:, None]).reshape(self.shape)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if function is aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].shape)
        if function is aten.mm.default or function is aten.t.default or function is aten.mul.Tensor:
            return function(*[arg.dequantize() if isinstance(arg, cls) else arg for arg in args], **(kwargs or {}))
        raise NotImplementedError(f"{function} of quantized numbers")


class Opaque(torch.Tensor):
    """A wrapper that does not say what it holds, and can do nothing."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{function} of an opaque tensor")


class Labelled(torch.Tensor):
    """A plain tensor of another class."""


class Frozen(nn.Module):
    """Weights that are not floating-point numbers, beside a low-rank matrix that is trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.codes = nn.Parameter(torch.randint(0, 255, (8, 8), dtype=torch.uint8, generator=generator), False)
        self.signed = nn.Parameter(torch.randint(-9, 9, (8,), dtype=torch.int8, generator=generator), False)
        self.mask = nn.Parameter(torch.rand(8, generator=generator) > 0.2, False)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64), False)
        self.register_buffer("positions", torch.arange(8))
        self.register_buffer("rotation", torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.codes.to(x.dtype) - 127) / 127 + self.signed.to(x.dtype) / 90
        return x @ weight * self.mask


class LowRank(nn.Module):
    """QLoRA in small."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 8, bias=False)
        self.base = Frozen()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class EightBit(torch.optim.Optimizer):
    """Momentum in uint8, with the names of the state that the usual library of 8-bit optimizers has."""

    BLOCK = 8

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Makes a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: torch.Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            blocks = -(-parameter.numel() // self.BLOCK)
            state["step"] = torch.zeros(())
            state["state1"] = torch.full(parameter.shape, 128, dtype=torch.uint8, device=parameter.device)
            state["absmax1"] = torch.zeros(blocks, device=parameter.device)
            state["qmap1"] = torch.linspace(-1, 1, 256, device=parameter.device)
        scale = state["absmax1"].repeat_interleave(self.BLOCK)[: parameter.numel()].view(parameter.shape)
        momentum = (state["state1"].float() - 128) / 127 * scale * 0.9 + parameter.grad.float()
        pad = nn.functional.pad(momentum.flatten().abs(), (0, -parameter.numel() % self.BLOCK))
        state["absmax1"].copy_(pad.view(-1, self.BLOCK).amax(dim=1))
        scale = state["absmax1"].repeat_interleave(self.BLOCK)[: parameter.numel()].view(parameter.shape)
        state["state1"].copy_((momentum / scale.clamp(min=1e-12) * 127 + 128).round())
        state["step"] += 1
        parameter.sub_((lr * momentum).to(parameter.dtype))
