"""Files of weights and checkpoints, one module a layout: where every tensor lies, and what is damaged."""

from __future__ import annotations

from pathlib import Path

from hallo_numguard.files.formats import folder
from hallo_numguard.files.formats.mapped import load
from hallo_numguard.files.formats.registry import FILES
from hallo_numguard.files.formats.source import Checksum, DamagedFile, Source, TensorEntry, UnknownLayout

__all__ = ["Checksum", "DamagedFile", "Source", "TensorEntry", "UnknownLayout", "load", "open_source"]


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
    for reader in (folder,) if path.is_dir() else FILES:
        if reader.recognises(path):
            return reader.read(path)
    raise UnknownLayout(f"{path} is of no layout that can be read here")
