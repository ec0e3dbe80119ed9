"""A model in memory, and whether it holds the values of its files: `strict=False` hides that nothing was loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, TensorEntry, load

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
        is_loaded: Whether it should hold the values of its files; False for one that was only built.
    """

    module: nn.Module
    shapes: Shapes
    state: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    unsaved: frozenset[str]
    forward: Callable[..., Any]
    is_loaded: bool = True


def check(model: LoadedModel, entries: Mapping[str, TensorEntry], path: Path) -> list[Finding]:
    """Compares a model's values with those of the same name in its files. Reads them once.

    Tensors on the meta device, or of another shape (ZeRO-3), are ignored.

    Args:
        model: The model.
        entries: Tensors in the files by the model's names.
        path: File or folder that messages name.
    """
    equal: list[str] = []
    different: list[str] = []
    for name, entry in entries.items():
        held = model.state.get(name)
        if held is None or held.is_meta or held.shape != entry.shape:
            continue
        try:
            saved = load(entry)
            if not is_equal(saved, held):
                different.append(name)
            elif not is_constant(saved):  # a new model holds ones and zeros as well
                equal.append(name)
        except (DamagedFile, OSError):
            continue  # the scan reports it
    if not different:
        return []
    more = f" and {len(different) - _MAX_NAMES} more" if len(different) > _MAX_NAMES else ""
    names = ", ".join(different[:_MAX_NAMES]) + more
    total = len(equal) + len(different)
    answer = "it was loaded in part" if equal else "nothing of it was loaded"
    message = f"{answer}: {len(different)} of {total} tensors of the model are not as in {path.name}: {names}"
    severity = "info" if _TRAINED_RATIO * len(equal) > len(different) else "warning"
    remedy = "Right if they were trained since, or come from elsewhere; else they were not loaded (strict=False)."
    file = str(path)
    return [Finding("not_loaded", message, name=different[0], severity=severity, file=file, remedy=remedy)]


def fill(module: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Loads tensors into a model where names and shapes agree; `keys` reports the others."""
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, entry in entries.items():
            held = state.get(name)
            if held is not None and held.shape == entry.shape:
                held.copy_(load(entry))


def is_constant(values: torch.Tensor) -> bool:
    """Returns whether all values of a tensor are the same."""
    return values.numel() < 2 or bool((values == values.flatten()[0]).all())


def is_equal(saved: torch.Tensor, held: torch.Tensor) -> bool:
    """Returns whether a tensor of a model has the values of one in a file, converted to its dtype."""
    saved, held = saved.to(held.dtype), held.detach().cpu()
    if not saved.is_floating_point():
        return torch.equal(saved, held)
    return torch.allclose(saved, held, rtol=0.0, atol=0.0, equal_nan=True)
