"""Folders: checkpoints, models (Hugging Face, diffusers), Accelerate's save_state, with all weights in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import consistency
from hallo_numguard.files.formats.consistency import trackers
from hallo_numguard.files.formats.consistency.sidecar_json import configuration
from hallo_numguard.files.formats.file_access import outside_links
from hallo_numguard.files.formats.registry import CHECKPOINTS, FILES
from hallo_numguard.files.formats.source import Source, joined

_INDEX = ".index.json"
_TELLING = frozenset({*trackers.FILES, "model_index.json"})  # files that say what lies in the folders beside them
_MAX_FOLDERS = 100_000
_MAX_FILES_PER_FOLDER = 100_000
_OF_TOOLS = frozenset({".cache", ".git", ".hg", ".ipynb_checkpoints", ".locks", ".no_exist", ".venv", "__pycache__"})


def recognises(path: Path) -> bool:
    """Returns whether the folder, or one below it, holds weights or an index of weights."""
    return any(_is_filled(folder) for folder in _Walk(path)) if path.is_dir() else False


def read(path: Path) -> Source:
    """Returns the tensors of all checkpoints and files of weights in the folder and those below it.

    Each folder with some is a part of the source.
    """
    walk = _Walk(path)
    parts: list[Source] = []
    owned: set[Path] = set()  # folders that belong to a checkpoint above them
    for folder in walk:
        if folder in owned or not (_is_filled(folder) or _TELLING & set(_names(folder))):
            continue
        part = _read(folder)
        owned.update(above for file in part.files for above in file.parents if folder in above.parents)
        parts.append(part)
    linked = tuple(_links(path, [file for part in parts for file in part.files]))
    if len(parts) == 1 and parts[0].root == path:
        whole = parts[0]
    else:
        names = (name for part in parts for name in part.layout.split(", ") if name)
        layout = ", ".join(dict.fromkeys(names))
        whole = joined(layout, path, parts)
    unchecked = (*whole.unchecked, *walk.left_out)
    return replace(whole, findings=(*whole.findings, *linked), unchecked=unchecked)


@dataclass
class _Walk:
    """The folder and all below it, in order of their names. Links are followed, each folder is visited once.

    Attributes:
        top: The folder.
        left_out: Sentences on folders that were not visited.
    """

    top: Path
    left_out: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Path]:
        folders, seen = [self.top], set[str]()
        while folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            if len(seen) >= _MAX_FOLDERS:
                self.left_out.append(f"{self.top} has more than {_MAX_FOLDERS} folders below it: the others")
                return
            seen.add(real)
            yield folder
            folders.extend(reversed(self._below(folder)))

    def _below(self, folder: Path) -> list[Path]:
        try:
            with os.scandir(folder) as found:
                names = sorted(entry.name for entry in found if _is_folder(entry))
        except OSError as error:
            self.left_out.append(f"{folder} cannot be listed: {error.strerror}")
            return []
        is_cache = "snapshots" in names or any("--" in name for name in names)  # its blobs are what the links lead to
        return [folder / name for name in names if name not in _OF_TOOLS and not (is_cache and name == "blobs")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_filled(folder: Path) -> bool:
    if any(reader.recognises(folder) for reader in CHECKPOINTS):
        return True
    return any(file.name.endswith(_INDEX) or _is_read(file) for file in _files(folder))


def _is_read(file: Path) -> bool:
    return any(reader.recognises(file) for reader in FILES)


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in found if not _is_folder(entry))[:_MAX_FILES_PER_FOLDER]
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder)]


def _read(folder: Path) -> Source:
    """One folder: its checkpoints, its other files of weights, and whether they agree with each other."""
    parts = [reader.read(folder) for reader in CHECKPOINTS if reader.recognises(folder)]
    known = {file for part in parts for file in part.files}
    for file in _files(folder):
        reader = None if file in known else next((one for one in FILES if one.recognises(file)), None)
        if reader is not None:
            parts.append(reader.read(file))
    facts, findings = consistency.check(folder, parts)
    metadata = {**_metadata(folder, parts), **facts}
    if len(parts) == 1 and parts[0].root == folder:
        whole = replace(parts[0], metadata=metadata)
    else:
        whole = joined(", ".join(dict.fromkeys(part.layout for part in parts)), folder, parts, **metadata)
    return replace(whole, findings=(*whole.findings, *findings), parts=tuple(parts))


def _metadata(folder: Path, parts: list[Source]) -> dict[str, Any]:
    """Metadata of the checkpoints in a folder, with the dtype that the model's configuration names."""
    metadata: dict[str, Any] = {}
    for part in parts:
        metadata.update(part.metadata if part.root == folder else {})
    config = configuration(folder)
    dtype, quantization = config.get("dtype", config.get("torch_dtype")), config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    found = {"dtype": dtype, "quantization": method}
    return {**metadata, **{key: value for key, value in found.items() if isinstance(value, str)}}


def _links(root: Path, files: list[Path]) -> Iterator[Finding]:
    outside = outside_links(files, root)
    if outside:
        more = f", and {len(outside) - 1} more" if len(outside) > 1 else ""
        message = f"{outside[0].name} is reached by a link out of {root.name}, to {os.path.realpath(outside[0])}{more}"
        yield Finding("escape", message, severity="info", file=str(outside[0]))
