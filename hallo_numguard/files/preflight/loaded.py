"""A model in memory, and whether it holds the values of its files: `strict=False` hides that nothing was loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, load, open_source

Shapes = Mapping[str, tuple[int, ...]]

_MAX_NAMES = 10  # in a message
_TRAINED_RATIO = 10  # different tensors per equal one: beyond, hardly anything can have been loaded


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        module: The model.
        shapes: Shapes in its state dict by name; with ZeRO-3, of the whole weights.
        state: Tensors of the model on this rank, by name.
        aliases: First name of each tensor that has several, by every name.
        unsaved: Names of buffers that are not in its state dict.
        forward: Function that calls the module as training does.
    """

    module: nn.Module
    shapes: Shapes
    state: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    unsaved: frozenset[str]
    forward: Callable[..., Any]


def check(model: LoadedModel, source: Source) -> list[Finding]:
    """Compares a model's values with those of the same name in a file. Reads the file once.

    Tensors on the meta device, or of another shape (ZeRO-3), are ignored.
    """
    equal: list[str] = []
    different: list[str] = []
    for entry in source.entries:
        held = model.state.get(entry.name)
        if held is None or held.is_meta or entry.role not in ("parameter", "buffer") or held.shape != entry.shape:
            continue
        try:
            (equal if _equal(load(entry), held) else different).append(entry.name)
        except (DamagedFile, OSError):
            continue  # the scan reports it
    if not different:
        return []
    more = f" and {len(different) - _MAX_NAMES} more" if len(different) > _MAX_NAMES else ""
    names = ", ".join(different[:_MAX_NAMES]) + more
    total = len(equal) + len(different)
    message = f"{len(different)} of {total} tensors of the model are not as in {source.root.name}: {names}"
    severity = "info" if _TRAINED_RATIO * len(equal) > len(different) else "warning"
    remedy = "Right if they were trained since, or come from elsewhere; else they were not loaded (strict=False)."
    file = str(source.root)
    return [Finding("not_loaded", message, name=different[0], severity=severity, file=file, remedy=remedy)]


def fill(module: nn.Module, paths: Iterable[Path]) -> None:
    """Loads the weights of files into a model where names and shapes agree; `keys` reports the others.

    Raises:
        UnknownLayout: If a file has no known layout.
    """
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for entry in (entry for path in paths for entry in open_source(path).entries):
            held = state.get(entry.name)
            if held is not None and held.shape == entry.shape:
                held.copy_(load(entry))


def _equal(saved: torch.Tensor, held: torch.Tensor) -> bool:
    saved, held = saved.to(held.dtype), held.detach().cpu()
    if not saved.is_floating_point():
        return torch.equal(saved, held)
    return torch.allclose(saved, held, rtol=0.0, atol=0.0, equal_nan=True)
