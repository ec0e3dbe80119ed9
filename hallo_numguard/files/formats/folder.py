"""Folders: checkpoints, models (Hugging Face, diffusers), Accelerate's save_state, with all weights in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import check_inside, is_plain, read_small
from hallo_numguard.files.formats.registry import CHECKPOINTS, FILES
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged, joined

_CONFIGS = ("config.json", "adapter_config.json")
_INDEX = ".index.json"
_MAX_JSON_BYTES = 64 << 20
_MAX_FOLDER_DEPTH = 3
_MAX_FILES_PER_FOLDER = 100_000
_REMEDY = "Copy or download the whole folder again."


def recognises(path: Path) -> bool:
    """Returns whether the folder holds weights, or an index of weights."""
    if not path.is_dir():
        return False
    found = (next(path.glob(f"*{_INDEX}"), None), next(_weights(path, _MAX_FOLDER_DEPTH), None))
    return _is_checkpoint(path) or any(found)


def read(path: Path) -> Source:
    """Returns the tensors of a checkpoint, and of all files of weights in the folder and its subfolders."""
    parts = [reader.read(path) for reader in CHECKPOINTS if reader.recognises(path)]
    known = {file for part in parts for file in part.files}
    parts += [_read(item, path) for item in _weights(path, 0 if parts else _MAX_FOLDER_DEPTH) if item not in known]
    if len(parts) == 1 and parts[0].root == path:
        return parts[0]
    findings = [finding for index in sorted(path.rglob(f"*{_INDEX}")) for finding in _check_index(index, parts)]
    layout = ", ".join(dict.fromkeys(part.layout for part in parts))
    source = joined(layout, path, parts, **_metadata(path, parts))
    return replace(source, findings=(*source.findings, *findings))


def _is_checkpoint(path: Path) -> bool:
    return any(reader.recognises(path) for reader in CHECKPOINTS)


def _weights(folder: Path, depth: int) -> Iterator[Path]:
    """Files of weights; in subfolders, checkpoints as well."""
    for item in sorted(folder.iterdir())[:_MAX_FILES_PER_FOLDER]:
        if not item.is_dir():
            if any(reader.recognises(item) for reader in FILES):
                yield item
        elif depth > 0 and not item.is_symlink():
            if _is_checkpoint(item):
                yield item
            else:
                yield from _weights(item, depth - 1)


def _read(item: Path, root: Path) -> Source:
    try:
        check_inside(item, root)
    except DamagedFile as error:
        return damaged("link", item, error)
    return read(item) if item.is_dir() else next(reader for reader in FILES if reader.recognises(item)).read(item)


def _check_index(index: Path, parts: list[Source]) -> Iterator[Finding]:
    """Compares the tensors in the shards with those that the index names."""
    try:
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DamagedFile("is damaged: it does not say which file holds which tensor", remedy=_REMEDY)
    except DamagedFile as error:
        yield error.finding(index)
        return
    held = {part.root: {entry.name for entry in part.entries} for part in parts}
    unreadable = {part.root for part in parts if part.findings or part.unchecked}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not is_plain(name):
            yield DamagedFile(f"leads out of the folder: {name}", kind="escape", remedy=_REMEDY).finding(index)
        elif shard not in held:
            yield _finding("missing_shard", f"{name} is missing, and {index.name} says that it holds weights", shard)
        elif shard not in unreadable:
            indexed = {tensor for tensor, file in weight_map.items() if file == name}
            yield from _differences(shard, indexed, held[shard])


def _differences(shard: Path, indexed: set[str], held: set[str]) -> Iterator[Finding]:
    for name in sorted(indexed - held):
        yield _finding("missing_tensor", f"{shard.name} lacks {name}, which the index says it holds", shard, name)
    for name in sorted(held - indexed):
        yield _finding("extra_tensor", f"{shard.name} holds {name}, which the index does not name", shard, name)


def _finding(kind: str, message: str, file: Path, name: str = "") -> Finding:
    return Finding(kind, message, name=name, severity="error", file=str(file), remedy=_REMEDY)


def _metadata(path: Path, parts: list[Source]) -> dict[str, Any]:
    """Metadata of all parts, with the dtype that the model's configuration names."""
    metadata: dict[str, Any] = {}
    for part in parts:
        metadata.update(part.metadata if part.root.is_dir() else {})
    for name in _CONFIGS:
        try:
            config = _json(path / name) if (path / name).is_file() else {}
        except DamagedFile:
            continue
        dtype = config.get("dtype", config.get("torch_dtype"))
        if isinstance(dtype, str):
            metadata["dtype"] = dtype
    return metadata


def _json(path: Path) -> Mapping[str, Any]:
    text = read_small(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"is damaged: {type(error).__name__}", remedy=_REMEDY) from None
    if not isinstance(value, Mapping):
        raise DamagedFile("is damaged: it holds no JSON object", remedy=_REMEDY)
    return value
