"""One reader a layout. A new layout is a new module with `recognises` and `read`, and its name in the list here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from hallo_numguard.checkpoint.readers import safetensors, torch_zip
from hallo_numguard.checkpoint.readers.memory import load
from hallo_numguard.checkpoint.readers.source import Checksum, DamagedFile, Source, TensorEntry, UnknownLayout

__all__ = ["Checksum", "DamagedFile", "Source", "TensorEntry", "UnknownLayout", "load", "open_source"]


class _Reader(Protocol):
    def recognises(self, path: Path) -> bool:
        """Returns whether a path is of this layout, at a glance."""

    def read(self, path: Path) -> Source:
        """Returns what it holds. What is damaged becomes a finding."""


_READERS = cast("tuple[_Reader, ...]", (safetensors, torch_zip))  # the first that recognises a path reads it


def open_source(path: Path) -> Source:
    """Returns what a file or a folder holds: where every tensor's bytes lie, what else it says, what is damaged.

    Args:
        path: A file of weights, or the folder of a model or a checkpoint.

    Raises:
        UnknownLayout: If it is not there, or no reader knows it.

    Cost: headers, directories and pickles are read, values are not. No foreign code runs.
    """
    if not path.exists():
        raise UnknownLayout(f"{path} is not there")
    for reader in _READERS:
        if reader.recognises(path):
            return reader.read(path)
    raise UnknownLayout(f"{path} is of no layout that can be read here")
