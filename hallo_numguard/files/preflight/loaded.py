"""Whether a model holds what its files do: with `strict=False`, or a wrong name, nothing is loaded and nothing said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, load, open_source

_MOST = 10  # names in a sentence
_MANY = 10  # times as many that are not as in the file, from which on hardly anything can have been loaded


def check(state: Mapping[str, torch.Tensor], source: Source) -> list[Finding]:
    """Compares a model's tensors with those of the same name in a file.

    Args:
        state: The model's tensors by name; what is on no device, or elsewhere (ZeRO-3), is passed over.
        source: The file.

    Cost: one read of the file.
    """
    same: list[str] = []
    other: list[str] = []
    for entry in source.entries:
        held = state.get(entry.name)
        if held is None or held.is_meta or entry.role not in ("parameter", "buffer") or held.shape != entry.shape:
            continue
        try:
            equal = _equal(load(entry), held)
        except (DamagedFile, OSError):
            continue  # which the scan of values says
        (same if equal else other).append(entry.name)
    return list(_findings(source, same, other))


def fill(module: nn.Module, paths: Iterable[Path]) -> None:
    """Gives a model the weights of files, where names and shapes are the same: what is not is for `keys` to say.

    Raises:
        UnknownLayout: If a file is of no known layout.
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


def _findings(source: Source, same: list[str], other: list[str]) -> Iterator[Finding]:
    if not other:
        return
    where = source.root
    more = f" and {len(other) - _MOST} more" if len(other) > _MOST else ""
    names = ", ".join(other[:_MOST]) + more
    message = f"{len(other)} of {len(same) + len(other)} tensors of the model are not as in {where.name}"
    remedy = "Right if they were trained since, or are from elsewhere; else they were not loaded (names, strict=False)."
    severity = "info" if _MANY * len(same) > len(other) else "warning"
    yield Finding("not_loaded", f"{message}: {names}", name=other[0], severity=severity, file=str(where), remedy=remedy)
