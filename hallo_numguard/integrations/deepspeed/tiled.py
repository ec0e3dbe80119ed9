"""DeepSpeed's tiled computations (ALST), while the guard runs a pass again.

Each is an autograd function that computes again in its backward pass, and calls `torch.autograd.backward` there: that
adds to the gradients of the parameters, and DeepSpeed reduces them. In a pass of the guard the tiles are computed one
after the other with a graph, and nothing is added anywhere.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def with_graph() -> Iterator[None]:
    """Replaces these functions inside."""
    module = sys.modules.get("deepspeed.runtime.sequence_parallel.ulysses_sp")
    classes = [(getattr(module, name, None), function) for name, function in _IN_PLACE_OF.items()]
    found = [(cls, function) for cls, function in classes if cls is not None and "apply" not in vars(cls)]
    for cls, function in found:
        cls.apply = staticmethod(function)
    try:
        yield
    finally:
        for cls, _ in found:
            del cls.apply


def _tiled_mlp(fn: Callable[..., Any], owner: Any, x: torch.Tensor, shards: int, _: Any = None) -> torch.Tensor:
    return torch.cat([fn(owner, shard) for shard in torch.chunk(x, chunks=shards, dim=-2)], dim=-2)


def _sequence_tiled_compute(
    fn: Callable[..., Any],
    length: int,
    shards: int,
    keys_to_shard: Sequence[str],
    keys_to_pass: Sequence[str],
    _key: str,
    _parameters: Any,
    dimension: int,
    reduction: str | None,
    *args: Any,
) -> torch.Tensor:
    cut = dict(zip(keys_to_shard, args, strict=False))
    whole = dict(zip(keys_to_pass, args[len(keys_to_shard) :], strict=False))
    size = math.ceil(length / shards)
    tiles = []
    for at in range(shards):
        place = slice(at * size, (at + 1) * size)
        tiles.append(fn(**{key: value[:, place] for key, value in cut.items()}, **whole))
    return _reduced(torch.stack(tiles) if dimension == 0 else torch.cat(tiles, dim=dimension), reduction)


def _tiled_loss(
    fn: Callable[..., Any],
    owner: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    shards: int,
    _: Any,
    reduction: str,
) -> torch.Tensor:
    given = [x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:])]
    given += [] if mask is None else [mask.reshape(-1)]
    tiles = zip(*(torch.chunk(item, chunks=shards, dim=0) for item in given), strict=True)
    return _reduced(torch.stack([fn(owner, *tile) for tile in tiles]), reduction)


def _reduced(tiles: torch.Tensor, reduction: str | None) -> torch.Tensor:
    return tiles if reduction is None else tiles.mean() if reduction == "mean" else tiles.sum()


_IN_PLACE_OF: dict[str, Callable[..., Any]] = {
    "TiledMLP": _tiled_mlp,
    "SequenceTiledCompute": _sequence_tiled_compute,
    "TiledFusedLogitsLoss": _tiled_loss,
}
