"""Families of models as people train them, small, at their default initialisation, each with a task that it can learn.

Every model draws its random numbers from where its like does: torch, numpy, its own forward pass, its training step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Batch = Mapping[str, Any]


class Family:
    """A model, its data and its training step.

    Attributes:
        losses: Names of the methods that compute a loss, in the order of a step; each gets the batch, and the modules
            of `parts` as the framework has wrapped them.
        stepped: For each of them, positions of the optimizers that step after its backward pass.
        unused: Whether a step may leave parameters out, of which DistributedDataParallel wants to be told.
        clipped: Whether gradients are clipped where the way clips: torch clips no sparse ones.
    """

    losses: Sequence[str] = ("loss",)
    stepped: Sequence[Sequence[int]] = ((0,),)
    unused = False
    clipped = True

    def build(self) -> nn.Module:
        """Returns a new model."""
        raise NotImplementedError

    def batch(self, generator: torch.Generator) -> Batch:
        """Returns a new batch."""
        raise NotImplementedError

    def loss(self, batch: Batch, model: Any) -> torch.Tensor:
        """Calls the model, and returns the loss. Default: the model computes it."""
        return model(**batch).loss

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Returns the modules that are wrapped each by itself."""
        return [model]

    def groups(self, model: nn.Module) -> list[Any]:
        """Returns parameters, or groups of them, for one optimizer."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Returns new optimizers; one where `groups` are all that is trained."""
        return [torch.optim.AdamW(self.groups(model), lr=1e-3)]


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def randint(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def pictures(generator: torch.Generator, count: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright quarter, and which quarter that is."""
    noise, labels = randn(generator, count, channels, 16, 16), randint(generator, 0, 4, count)
    for picture, label in zip(noise, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0
    return noise, labels


# -- pictures ----------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout2d(0.1)),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 4)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class Vision(Family):
    """Convolutions with batch norm, in channels_last."""

    def build(self):
        return ConvNet().to(memory_format=torch.channels_last)

    def batch(self, generator):
        images, labels = pictures(generator, 8)
        return {"images": images, "labels": labels}

    def loss(self, batch, model):
        return F.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=0.1)


class VisionTransformer(Family):
    """A ViT of transformers."""

    def build(self):
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=4))

    def batch(self, generator):
        images, labels = pictures(generator, 8)
        return {"pixel_values": images, "labels": labels}


class Detector(nn.Module):
    """One trunk, three heads, without anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        )
        self.classes, self.boxes, self.centres = (nn.Conv2d(32, size, 3, padding=1) for size in (2, 4, 1))
        nn.init.constant_(self.classes.bias, -math.log(99))  # so that nothing is found at first, as in RetinaNet

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images)
        heads = {"classes": self.classes, "boxes": self.boxes, "centres": self.centres}
        made = {name: head(features).float().flatten(2).transpose(1, 2) for name, head in heads.items()}
        return {**made, "boxes": F.softplus(made["boxes"])}


class Detection(Family):
    """Several heads, a loss of parts, pictures and whole batches without a box."""

    def build(self):
        return Detector()

    def batch(self, generator):
        images = randn(generator, 4, 3, 16, 16) * 0.3
        targets = []
        busy = int(randint(generator, 0, 4, 1)) > 0
        for image in images:
            count = int(randint(generator, 0, 3, 1)) if busy else 0
            corners = randint(generator, 0, 8, count, 2)
            boxes = torch.cat([corners, corners + randint(generator, 4, 9, count, 2)], 1).float()
            labels = randint(generator, 0, 2, count)
            for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
                image[label, top:bottom, left:right] += 2.0
            targets.append({"boxes": boxes, "labels": labels})
        return {"images": images, "targets": targets}

    def loss(self, batch, model):
        made = model(batch["images"])
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(-1, 2) * 4.0 + 2
        classes = torch.zeros_like(made["classes"])
        positive: list[tuple[int, int]] = []
        distances = []
        for picture, target in enumerate(batch["targets"]):
            for box, label in zip(target["boxes"].float(), target["labels"].tolist(), strict=True):
                sides = torch.cat([grid - box[:2], box[2:] - grid], 1)
                for place in (sides.min(1).values > 0).nonzero().flatten().tolist():
                    classes[picture, place, label] = 1
                    positive.append((picture, place))
                    distances.append(sides[place] / 4)
        count = max(1, len(positive))
        chance = made["classes"].sigmoid()
        focus = torch.where(classes > 0, 1 - chance, chance).square()
        entropy = F.binary_cross_entropy_with_logits(made["classes"], classes, reduction="none")
        total = (focus * entropy).sum() / count
        if not positive:
            return total + 0 * (made["boxes"].sum() + made["centres"].sum())
        at, where = map(list, zip(*positive, strict=True))
        wanted = torch.stack(distances)
        close = wanted.unflatten(1, (2, 2))
        centred = (close.min(1).values / close.max(1).values).prod(1).sqrt()
        centre = F.binary_cross_entropy_with_logits(made["centres"][at, where, 0], centred)
        return total + F.smooth_l1_loss(made["boxes"][at, where], wanted) + centre


class Quantizer(nn.Module):
    """A codebook that follows the means of what falls to each code."""

    def __init__(self, codes: int = 32, width: int = 16) -> None:
        super().__init__()
        book = torch.randn(codes, width)
        self.register_buffer("book", book)
        self.register_buffer("means", book.clone())
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.permute(0, 2, 3, 1).flatten(0, 2).float()
        book = self.book.float()
        codes = torch.cdist(flat, book).argmin(1)
        if self.training:
            with torch.no_grad():
                chosen = F.one_hot(codes, len(book)).float()
                self.counts.mul_(0.99).add_(chosen.sum(0), alpha=0.01)
                self.means.mul_(0.99).add_(chosen.T @ flat, alpha=0.01)
                total = self.counts.sum()
                smooth = (self.counts + 1e-5) / (total + len(book) * 1e-5) * total
                self.book.copy_(self.means / smooth[:, None])
        found = book[codes].reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = F.mse_loss(x.float(), found)
        return x + (found.to(x.dtype) - x).detach(), commitment


class VectorQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 4, 2, 1))
        self.quantizer = Quantizer()
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, commitment = self.quantizer(self.encoder(images))
        return self.decoder(codes), commitment


class VectorQuantization(Family):
    """An autoencoder whose codebook is buffers that the forward pass writes."""

    def build(self):
        return VectorQuantized()

    def batch(self, generator):
        return {"images": pictures(generator, 8, 1)[0]}

    def loss(self, batch, model):
        made, commitment = model(batch["images"])
        return F.mse_loss(made.float(), batch["images"].float()) + 0.25 * commitment


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm
        self.generator = nn.Sequential(
            *(nn.Linear(16, 128), nn.Unflatten(1, (32, 2, 2)), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh()),
        )
        self.discriminator = nn.Sequential(
            *(normed(nn.Conv2d(1, 16, 4, 2, 1)), nn.LeakyReLU(0.2), normed(nn.Conv2d(16, 32, 4, 2, 1))),
            *(nn.LeakyReLU(0.2), nn.Flatten(), normed(nn.Linear(128, 1))),
        )


class Gan(Family):
    """Two networks against each other, spectral norm, two optimizers."""

    losses = ("discriminator_loss", "generator_loss")
    stepped = ((1,), (0,))
    clipped = False

    def build(self):
        return Adversarial()

    def parts(self, model):
        return [model.generator, model.discriminator]

    def optimizers(self, model):
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in self.parts(model)]

    def batch(self, generator):
        return {"images": torch.tanh(pictures(generator, 8, 1)[0][:, :, ::2, ::2])}

    def discriminator_loss(self, batch, generator, discriminator):
        fake = generator(torch.randn(8, 16)).detach()
        real, made = discriminator(torch.cat([batch["images"], fake])).chunk(2)
        return F.relu(1 - real).mean() + F.relu(1 + made).mean()

    def generator_loss(self, batch, generator, discriminator):
        return -discriminator(generator(torch.randn(8, 16))).mean()


# -- diffusion ---------------------------------------------------------------------------------------------------------


def time_features(time: torch.Tensor, width: int) -> torch.Tensor:
    angles = time.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class UNetBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, inside), nn.GroupNorm(4, outside)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)]
        )
        self.time = nn.Linear(32, outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        nn.init.zeros_(self.convs[1].weight)
        nn.init.zeros_(self.convs[1].bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        made = self.convs[0](F.silu(self.norms[0](x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.convs[1](F.silu(self.norms[1](made)))


class UNet(nn.Module):
    """Predicts noise; the last convolution of every block is zero at first, as in DDPM."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.middle, self.up = UNetBlock(16, 32), UNetBlock(32, 32), UNetBlock(48, 16)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        features = self.time(time_features(time, 32).to(self.first.weight.dtype))
        top = self.first(noisy)
        low = self.middle(self.down(F.avg_pool2d(top, 2), features), features)
        flat = low.flatten(2).transpose(1, 2)
        low = low + self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).view_as(low)
        return self.last(self.up(torch.cat([F.interpolate(low, scale_factor=2.0), top], 1), features))


def noised(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy pictures, timesteps, noise, and the share of signal, drawn anew."""
    time, noise = torch.randint(0, 1000, (len(images),)), torch.randn_like(images)
    signal = torch.cos(time / 1000 * math.pi / 2).square()[:, None, None, None]
    return (signal.sqrt() * images + (1 - signal).sqrt() * noise).to(images.dtype), time, noise, signal


class DiffusionUNet(Family):
    """Random timesteps, losses weighted by the ratio of signal and noise."""

    def build(self):
        return UNet()

    def batch(self, generator):
        return {"images": pictures(generator, 4)[0][:, :, ::2, ::2].contiguous()}

    def loss(self, batch, model):
        noisy, time, noise, signal = noised(batch["images"])
        ratio = (signal / (1 - signal).clamp(min=1e-6)).flatten()
        weight = ratio.clamp(max=5) / ratio.clamp(min=1e-6)
        errors = F.mse_loss(model(noisy, time).float(), noise.float(), reduction="none")
        return (errors.mean((1, 2, 3)) * weight).mean()


class DiTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2)])
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        made = self.norms[0](x) * (1 + scale) + shift
        x = x + gate * self.attention(made, made, made, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Gates and output are zero at first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.register_buffer("places", time_features(torch.arange(16), width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(5, width)
        self.blocks = nn.ModuleList([DiTBlock(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = nn.Linear(width, 12)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        dtype = self.last.weight.dtype
        if self.training:  # for guidance without a classifier
            labels = torch.where(torch.rand(len(labels)) < 0.1, 4, labels)
        condition = self.time(time_features(time, 32).to(dtype)) + self.labels(labels)
        x = self.patches(noisy).flatten(2).transpose(1, 2) + self.places.to(dtype)
        for block in self.blocks:
            x = block(x, condition)
        return F.fold(self.last(self.norm(x)).transpose(1, 2).float(), (8, 8), 2, stride=2)


class DiffusionTransformer(Family):
    """A DiT: adaLN-zero, labels dropped at random."""

    def build(self):
        return DiT()

    def batch(self, generator):
        images, labels = pictures(generator, 4)
        return {"images": images[:, :, ::2, ::2].contiguous(), "labels": labels}

    def loss(self, batch, model):
        noisy, time, noise, _ = noised(batch["images"])
        return F.mse_loss(model(noisy, time, batch["labels"]).float(), noise.float())


# -- language ----------------------------------------------------------------------------------------------------------


def repeated(generator: torch.Generator, count: int = 4, length: int = 8, words: int = 32) -> torch.Tensor:
    """Sentences that say everything twice."""
    return randint(generator, 2, words, count, length).repeat(1, 2)


class LanguageModel(Family):
    """A GPT-2 of transformers: tied head, dropout."""

    def build(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2))

    def batch(self, generator):
        tokens = repeated(generator)
        return {"input_ids": tokens, "labels": tokens}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes, **heads))


def replace_projections(model: nn.Module, make: Any) -> nn.Module:
    """Freezes a model, and wraps the projections of its attention."""
    model.requires_grad_(False)
    for part in list(model.modules()):
        for name in ("q_proj", "v_proj"):
            if hasattr(part, name):
                setattr(part, name, make(getattr(part, name)))
    return model


class Adapter(nn.Module):
    """LoRA: the second factor is zero at first."""

    def __init__(self, base: nn.Module, inside: int, outside: int) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(0.05)
        self.first, self.second = nn.Linear(inside, 4, bias=False), nn.Linear(4, outside, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 4.0 * self.second(self.first(self.dropout(x)))


class LowRank(LanguageModel):
    """LoRA on a frozen Llama of transformers."""

    def build(self):
        return replace_projections(llama(), lambda base: Adapter(base, base.in_features, base.out_features))


class Dequantized(torch.autograd.Function):
    """As bitsandbytes does: the weights are made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, absmax)
        return x @ dequantized(weight, absmax, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        weight, absmax = ctx.saved_tensors
        return gradients[0] @ dequantized(weight, absmax, gradients[0].dtype), None, None


def dequantized(weight: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return ((weight.float() - 128) / 127 * absmax.float()[:, None]).to(dtype)


class Frozen8Bit(nn.Module):
    """A linear layer whose weights are frozen bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        absmax = linear.weight.detach().abs().amax(1)
        codes = (linear.weight.detach() / absmax[:, None] * 127).round() + 128
        self.weight = nn.Parameter(codes.to(torch.uint8), requires_grad=False)
        self.register_buffer("absmax", absmax)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dequantized.apply(x, self.weight, self.absmax)


class QuantizedLowRank(LanguageModel):
    """QLoRA: the frozen weights are bytes."""

    def build(self):
        return replace_projections(llama(), lambda base: Adapter(Frozen8Bit(base), base.in_features, base.out_features))


class EncoderDecoder(Family):
    """A T5 of transformers: relative positions, masks of -Inf, padding."""

    def build(self):
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))

    def batch(self, generator):
        tokens = randint(generator, 2, 32, 4, 8)
        lengths = randint(generator, 3, 9, 4)
        mask = (torch.arange(8) < lengths[:, None]).long()
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


class Experts(nn.Module):
    """Noisy gates, the best two of four experts; an expert without a token is not called."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate, self.noise = nn.Linear(width, 4, bias=False), nn.Linear(width, 4, bias=False)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.noise.weight)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(4)]
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.gate(x)
        scores = scores + torch.randn_like(scores) * F.softplus(self.noise(x))
        best, chosen = scores.topk(2, -1)
        weights = best.float().softmax(-1)
        made = torch.zeros_like(x)
        importance = torch.zeros(len(x), 4).scatter(1, chosen, weights).sum(0)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                made = made.index_add(0, rows, (expert(x[rows]) * weights[rows, places, None]).to(made.dtype))
        return made, importance.var() / importance.mean().square()


class Mixture(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.experts = Experts(width)
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.mix(self.embedding(tokens))[0]
        made, balance = self.experts(self.norm(x).flatten(0, 1))
        return self.head(x + made.view_as(x)), balance


class MixtureOfExperts(Family):
    """Noisy gates, a balance loss, experts without a token."""

    unused = True

    def build(self):
        return Mixture()

    def batch(self, generator):
        return {"tokens": repeated(generator, length=2)}

    def loss(self, batch, model):
        logits, balance = model(batch["tokens"][:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"][:, 1:].flatten()) + 0.01 * balance


class Selective(nn.Module):
    """A selective state space, scanned step by step, as in Mamba."""

    def __init__(self, width: int = 32, states: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.select = nn.Linear(width, 2 * states + 1)
        self.rates = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(width, 1))
        self.through = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.full((width,), -3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        inside, gate = self.enter(x).chunk(2, -1)
        inside = F.silu(self.conv(inside.transpose(1, 2))[..., :length].transpose(1, 2))
        into, out, step = self.select(inside).float().split([8, 8, 1], -1)
        step = F.softplus(step + self.bias.float())
        decay = torch.exp(-step[..., None] * self.rates.float().exp())
        drive = (step * inside.float())[..., None] * into[:, :, None]
        state, made = torch.zeros_like(drive[:, 0]), []
        for at in range(length):
            state = decay[:, at] * state + drive[:, at]
            made.append((state * out[:, at, None]).sum(-1))
        result = torch.stack(made, 1) + self.through * inside.float()
        return self.leave(result.to(gate.dtype) * F.silu(gate))


class StateSpaceModel(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(2)])
        self.blocks = nn.ModuleList([Selective(width) for _ in range(2)])
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


class StateSpace(Family):
    """A scan over time."""

    def build(self):
        return StateSpaceModel()

    def batch(self, generator):
        return {"tokens": repeated(generator, length=4)}

    def loss(self, batch, model):
        return F.cross_entropy(model(batch["tokens"][:, :-1]).float().flatten(0, 1), batch["tokens"][:, 1:].flatten())


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 24, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(48, 2)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.head(torch.cat([last[-2], last[-1]], 1))


class Recurrent(Family):
    """An LSTM over packed sequences of different lengths."""

    def build(self):
        return Reader()

    def batch(self, generator):
        lengths = randint(generator, 1, 9, 8)
        tokens = randint(generator, 1, 32, 8, 8) * (torch.arange(8) < lengths[:, None])
        return {"tokens": tokens, "lengths": lengths, "labels": (tokens > 16).any(1).long()}

    def loss(self, batch, model):
        return F.cross_entropy(model(batch["tokens"], batch["lengths"]), batch["labels"])


# -- speech ------------------------------------------------------------------------------------------------------------


def speech(generator: torch.Generator, samples: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves of tones, and which tones they are, of 1 to `words` - 1."""
    labels = randint(generator, 1, words, 4, 3)
    time = torch.arange(samples // 3) / 100
    tones = torch.sin(labels.repeat_interleave(samples // 3, 1) * time.repeat(3) * 4)
    return tones + 0.05 * randn(generator, *tones.shape), labels


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64), persistent=False)
        self.register_buffer("mel", torch.rand(33, 20) / 33)
        self.convs = nn.Sequential(
            *(nn.Conv1d(20, 32, 3, 2, 1), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1)),
            *(nn.Conv1d(32, 32, 3, 1, 1), nn.BatchNorm1d(32), nn.GELU()),
        )
        self.head = nn.Linear(32, 8)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waves.float(), 64, 32, window=self.window.float(), return_complex=True).abs().square()
        mel = (spectrum.transpose(1, 2) @ self.mel.float()).clamp(min=1e-10).log10().transpose(1, 2)
        mel = (mel - mel.mean(-1, keepdim=True)) / (mel.std(-1, keepdim=True) + 1e-5)
        return self.head(self.convs(mel.to(self.head.weight.dtype)).transpose(1, 2))


class Speech(Family):
    """Log-mel features, convolutions, CTC."""

    def build(self):
        return Listener()

    def batch(self, generator):
        waves, labels = speech(generator, 1500, 8)
        return {"waves": waves, "labels": labels, "lengths": randint(generator, 1, 4, 4)}

    def loss(self, batch, model):
        scores = model(batch["waves"]).float().log_softmax(-1).transpose(0, 1)
        sizes = torch.full((4,), len(scores))
        return F.ctc_loss(scores, batch["labels"], sizes, batch["lengths"], zero_infinity=True)


class Wav2Vec2(Family):
    """A Wav2Vec2 of transformers: layer drop, numpy masks, weight norm."""

    unused = True

    def build(self):
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        convs = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
        places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        masks = {"mask_time_prob": 0.2, "mask_time_length": 2, "layerdrop": 0.2}
        loss = {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
        return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=8, **sizes, **convs, **places, **masks, **loss))

    def batch(self, generator):
        waves, labels = speech(generator, 600, 8)
        return {"input_values": waves, "labels": labels}


# -- others ------------------------------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.action, self.value = nn.Linear(32, 2), nn.Linear(32, 1)
        self.log_spread = nn.Parameter(torch.zeros(2))
        for layer in (self.body[0], self.body[2], self.value):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.orthogonal_(self.action.weight, 0.01)

    def forward(self, state: torch.Tensor) -> tuple[torch.distributions.Normal, torch.Tensor]:
        features = self.body(state)
        action = self.action(features).float()
        policy = torch.distributions.Normal(action, self.log_spread.float().exp().expand_as(action))
        return policy, self.value(features).float().squeeze(-1)


class Reinforcement(Family):
    """PPO: the policy acts without gradients, then is trained on what it did; the model returns a distribution."""

    def build(self):
        return ActorCritic()

    def batch(self, generator):
        return {"state": randn(generator, 32, 6)}

    def loss(self, batch, model):
        state = batch["state"]
        with torch.no_grad():
            acted, expected = model(state)
            action = acted.sample()
            before = acted.log_prob(action).sum(-1) + 0.05 * torch.randn(len(state))
            reward = -(action - state[:, :2].float()).square().sum(-1)
            advantage = reward - expected
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy, value = model(state)
        ratio = (policy.log_prob(action).sum(-1) - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return F.mse_loss(value, reward) * 0.5 - gain - 0.01 * policy.entropy().sum(-1).mean()


class GraphLayers(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.send = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])
        self.keep = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        x = torch.relu(self.first(nodes))
        for send, keep in zip(self.send, self.keep, strict=True):
            messages = send(x)[source]
            summed = torch.zeros_like(messages[:1]).expand(len(x), -1).index_add(0, target, messages)
            degree = torch.zeros(len(x)).index_add(0, target, torch.ones(len(target))).clamp(min=1)[:, None]
            x = torch.relu(keep(x) + (summed / degree).to(x.dtype))
        return self.head(x)


class Graph(Family):
    """Messages along the edges of graphs that have nodes without any."""

    def build(self):
        return GraphLayers()

    def batch(self, generator):
        count = int(randint(generator, 20, 40, 1))
        nodes, edges = randn(generator, count, 8), randint(generator, 0, count, 2, 2 * count)
        return {"nodes": nodes, "edges": edges, "labels": nodes[:, :3].argmax(1)}

    def loss(self, batch, model):
        return F.cross_entropy(model(batch["nodes"], batch["edges"]), batch["labels"])


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(500, 16, sparse=True), nn.EmbeddingBag(300, 16, mode="sum", sparse=True)
        self.mlp = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: torch.Tensor, items: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([self.users(user), self.items(items), dense], 1)).squeeze(1)


class Recommender(Family):
    """Tables with sparse gradients and an optimizer of their own."""

    stepped = ((0, 1),)
    clipped = False

    def build(self):
        return Tables()

    def optimizers(self, model):
        tables = [*model.users.parameters(), *model.items.parameters()]
        return [torch.optim.AdamW(model.mlp.parameters(), lr=1e-3), torch.optim.SparseAdam(tables, lr=1e-2)]

    def batch(self, generator):
        user, items = randint(generator, 0, 500, 16), randint(generator, 0, 300, 16, 3)
        labels = ((user % 2) == (items[:, 0] % 2)).float()
        return {"user": user, "items": items, "dense": randn(generator, 16, 4), "labels": labels}

    def loss(self, batch, model):
        scores = model(batch["user"], batch["items"], batch["dense"])
        return F.binary_cross_entropy_with_logits(scores.float(), batch["labels"].float())


class SparseDescent(Recommender):
    """The same tables, all trained by one SGD."""

    stepped = ((0,),)

    def optimizers(self, model):
        return [torch.optim.SGD(model.parameters(), lr=0.1)]


class Couplings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(4)])
        for layer in self.layers:
            nn.init.zeros_(layer[2].weight)
            nn.init.zeros_(layer[2].bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, volume = x, torch.zeros(len(x))
        for layer in self.layers:
            kept, changed = x.chunk(2, 1)
            scale, shift = layer(kept).float().chunk(2, 1)
            scale = 2 * torch.tanh(scale / 2)
            x = torch.cat([(changed * scale.exp() + shift).to(kept.dtype), kept], 1)
            volume = volume + scale.sum(1)
        return x, volume


class Flow(Family):
    """A normalising flow, whose loss may be negative."""

    def build(self):
        return Couplings()

    def batch(self, generator):
        first, second = randn(generator, 32, 2), randn(generator, 32, 2)
        return {"x": torch.cat([first, 0.05 * second + first.square() - 1], 1)}

    def loss(self, batch, model):
        latent, volume = model(batch["x"])
        return (0.5 * latent.float().square().sum(1) - volume).mean()


class HeatEquation(nn.Module):
    """Returns the residual of the equation, and what is wrong at time 0 and at the borders."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, points: torch.Tensor, start: torch.Tensor, border: torch.Tensor) -> tuple[torch.Tensor, ...]:
        points = points.requires_grad_(True)
        heat = self.net(points)
        slope = torch.autograd.grad(heat.sum(), points, create_graph=True)[0]
        curvature = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)[0][:, 0]
        wanted = torch.sin(math.pi * start[:, :1])
        return slope[:, 1] - 0.1 * curvature, self.net(start) - wanted, self.net(border)


class PhysicsInformed(Family):
    """Derivatives of derivatives, in the forward pass."""

    def build(self):
        return HeatEquation()

    def batch(self, generator):
        points, start, border = (torch.rand(16, 2, generator=generator) for _ in range(3))
        start[:, 1] = 0
        border[:, 0] = border[:, 0].round()
        return {"points": points, "start": start, "border": border}

    def loss(self, batch, model):
        return sum(part.float().square().mean() for part in model(**batch))


class QuantizationAware(Family):
    """Fake quantization of weights and activations, with observers that move."""

    def build(self):
        return FakeQuantized()

    def batch(self, generator):
        images, labels = pictures(generator, 8)
        return {"images": images, "labels": labels}

    def loss(self, batch, model):
        return F.cross_entropy(model(batch["images"]), batch["labels"])


class FakeQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
        from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver as PerChannel

        self.conv, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(1024, 4)
        weights = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        self.weights = nn.ModuleList([FakeQuantize(observer=PerChannel, ch_axis=0, **weights) for _ in range(2)])
        self.activations = nn.ModuleList(
            [FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255) for _ in range(2)]
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.activations[0](images.float())
        x = F.conv2d(x, self.weights[0](self.conv.weight), self.conv.bias, 2, 1)
        x = self.activations[1](torch.relu(x).float())
        return F.linear(x.flatten(1), self.weights[1](self.head.weight), self.head.bias)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.EmbeddingBag(32, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.normalize(self.picture(pictures).float(), dim=-1), F.normalize(self.text(words).float(), dim=-1)


class TowersWithScale(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # FSDP2 and ZeRO take no scalars

    def forward(self, pictures: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        left, right = super().forward(pictures, words)
        return left @ right.T * self.log_scale.float().exp().clamp(max=100)


class Contrastive(Family):
    """Two towers and a learnt temperature, as in CLIP."""

    def build(self):
        return TowersWithScale()

    def batch(self, generator):
        words = randint(generator, 0, 32, 16, 4)
        meaning = F.one_hot(words % 24, 24).float().sum(1)
        return {"pictures": meaning + 0.1 * randn(generator, 16, 24), "words": words}

    def loss(self, batch, model):
        return both_ways(model(batch["pictures"], batch["words"]))


def both_ways(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class OutsideTemperature(Contrastive):
    """The temperature is a parameter of the loss, outside of the model."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.zeros(()))

    def build(self):
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        return Towers()

    def groups(self, model):
        return [*model.parameters(), self.scale]

    def loss(self, batch, model):
        left, right = model(batch["pictures"], batch["words"])
        return both_ways(left @ right.T * self.scale.exp())


FAMILIES: dict[str, Family] = {
    "vision": Vision(),
    "ViT": VisionTransformer(),
    "detection": Detection(),
    "speech": Speech(),
    "Wav2Vec2": Wav2Vec2(),
    "language": LanguageModel(),
    "T5": EncoderDecoder(),
    "LoRA": LowRank(),
    "QLoRA": QuantizedLowRank(),
    "mixture of experts": MixtureOfExperts(),
    "state space": StateSpace(),
    "recurrent": Recurrent(),
    "diffusion UNet": DiffusionUNet(),
    "DiT": DiffusionTransformer(),
    "GAN": Gan(),
    "vector quantisation": VectorQuantization(),
    "normalising flow": Flow(),
    "actor-critic": Reinforcement(),
    "graph": Graph(),
    "recommender": Recommender(),
    "recommender, SGD": SparseDescent(),
    "physics-informed": PhysicsInformed(),
    "quantisation-aware": QuantizationAware(),
    "contrastive": Contrastive(),
    "contrastive, outside": OutsideTemperature(),
}
