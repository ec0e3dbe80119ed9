"""Two small models with what real ones have: attention, norms, residuals, frozen parts, masks, running statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Trap(nn.Module):
    """Changes nothing; when armed, its derivative is NaN: that of a square root at 0."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x - x).sqrt() if self.armed else x


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.query, x), (self.key, context), (self.value, context))
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return self.output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Causal; input and output embedding are tied, a projection of features is frozen."""

    trainable = "blocks.1.mlp.0.weight"
    frozen = "projection.weight"
    buffer = "positions"
    module = "blocks.1.mlp.0"
    trapped = "trap"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.projection = nn.Linear(6, 16).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.trap = Trap()
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.linspace(-1, 1, 6)[:, None].repeat(1, 16))
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.projection(features) + self.positions.to(features.dtype)
        x = self.trap(self.blocks[0](x, self.mask))
        return self.head(self.norm(self.blocks[1](x, self.mask)))

    @staticmethod
    def batch(generator: torch.Generator, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        tokens = torch.randint(0, 16, (4, 6), generator=generator)
        return (tokens, torch.randn(4, 6, 6, generator=generator).to(dtype)), tokens.roll(-1, 1)

    @staticmethod
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output.float().flatten(0, 1), target.flatten())


class MixtureOfExperts(nn.Module):
    """DeepSpeed's layer with four experts, shared out over two ranks where there are two; four hold two copies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        import deepspeed
        from deepspeed.moe.layer import MoE

        expert = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        deepspeed.init_distributed("gloo", verbose=False)
        parts = min(2, torch.distributed.get_world_size())
        self.layer = MoE(width, expert, num_experts=2 * parts, ep_size=parts, use_rts=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Experts(Transformer):
    """The same, with experts in its second block; the last is the second one of the last rank."""

    trainable = "blocks.1.mlp.layer.deepspeed_moe.experts.deepspeed_experts.1.0.weight"
    module = "blocks.1.mlp.layer.deepspeed_moe.experts.deepspeed_experts.1.0"

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp = MixtureOfExperts(16)

    def groups(self) -> list[dict[str, object]]:
        """The parameters as the optimizer takes them: those of experts apart."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return split_params_into_different_moe_groups_for_optimizer({"params": trained, "name": "all"})


class PlainMixture(nn.Module):
    """Experts of which each token takes one, as models of transformers have them: not all are used in a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 8)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.gate(x).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                y[mine] = expert(x[mine]) * weight[mine, None]
        return y


class SparseTransformer(Transformer):
    """The same, with a mixture in its second block."""

    trainable = "blocks.1.mlp.gate.weight"
    module = "blocks.1.mlp.gate"

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp = PlainMixture(16)


class Residual(nn.Module):
    def __init__(self, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(8, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.conv(functional.silu(self.norm(x))) + self.time(time)[:, :, None, None]


class UNet(nn.Module):
    """Denoises small images: down, attention to a frozen projection of sound, up, a skip; as Hallo's does."""

    trainable = "attention.query.weight"
    frozen = "sound.weight"
    buffer = "frequencies"
    module = "attention.query"
    trapped = "trap"

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.first = Residual(8, nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.trap = Trap()
        self.second = Residual(16, nn.GroupNorm(4, 16))
        self.sound = nn.Linear(5, 16).requires_grad_(False)
        self.attention = Attention(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.third = Residual(8, nn.GroupNorm(2, 8))
        self.leave = nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("frequencies", torch.logspace(0, 1, 4))

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        angle = time[:, None] * self.frequencies.to(time.dtype)
        time = torch.cat([angle.sin(), angle.cos()], dim=1)
        skip = self.first(self.enter(noisy), time)
        x = self.second(self.trap(self.down(skip)), time)
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.attention(rows, self.sound(sound))
        return self.leave(self.third(self.up(rows.transpose(1, 2).view_as(x)) + skip, time))

    @staticmethod
    def batch(generator: torch.Generator, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        image = torch.randn(4, 3, 8, 8, generator=generator)
        noise = torch.randn(4, 3, 8, 8, generator=generator)
        time = torch.rand(4, generator=generator)
        sound = torch.randn(4, 7, 5, generator=generator)
        return tuple(item.to(dtype) for item in (image + noise, time, sound)), noise

    @staticmethod
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.float() - target).square().mean()


MODELS = {"transformer": Transformer, "unet": UNet}
WITH_EXPERTS = {**MODELS, "experts": Experts, "sparse": SparseTransformer}  # under DeepSpeed only
