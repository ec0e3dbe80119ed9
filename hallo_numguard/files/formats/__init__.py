"""Files of weights and checkpoints, one module per layout: where every tensor lies, and what is damaged."""

from __future__ import annotations

from pathlib import Path

from hallo_numguard.files.formats import folder
from hallo_numguard.files.formats.registry import FILES
from hallo_numguard.files.formats.source import Checksum, DamagedFile, Source, TensorEntry, UnknownLayout, load

__all__ = ["Checksum", "DamagedFile", "Source", "TensorEntry", "UnknownLayout", "load", "open_source"]


def open_source(path: Path) -> Source:
    """Returns where every tensor of a file or folder lies, its metadata, and structural damage.

    Reads headers, zip directories and pickles, but no tensor values. Runs no code from the files.

    Args:
        path: File of weights, or folder of a model or checkpoint.

    Raises:
        UnknownLayout: If the path does not exist, or no reader recognises it.
    """
    if not path.exists():
        raise UnknownLayout(f"{path} does not exist")
    for reader in (folder,) if path.is_dir() else FILES:
        if reader.recognises(path):
            return reader.read(path)
    raise UnknownLayout(f"{path} has no layout that can be read")
