"""JSON documents beside weights, such as indexes and configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hallo_numguard.files.formats.file_access import read_small
from hallo_numguard.files.formats.source import DamagedFile

REMEDY = "Copy or download the whole folder again."
_CONFIGS = ("config.json", "adapter_config.json")
_MAX_BYTES = 64 << 20


def document(path: Path) -> Mapping[str, Any]:
    """Returns a JSON object.

    Raises:
        DamagedFile: If it cannot be read, or is none.
    """
    text = read_small(path, _MAX_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"is damaged: {type(error).__name__}", remedy=REMEDY) from None
    if not isinstance(value, Mapping):
        raise DamagedFile("is damaged: it holds no JSON object", remedy=REMEDY)
    return value


def document_or_empty(path: Path) -> Mapping[str, Any]:
    """Returns a JSON object; empty if there is none, or it is damaged."""
    try:
        return document(path) if path.is_file() else {}
    except DamagedFile:
        return {}


def configuration(folder: Path) -> Mapping[str, Any]:
    """Returns the configurations of the model and the adapter in a folder as one; empty without any."""
    merged: dict[str, Any] = {}
    for name in _CONFIGS:
        merged.update(document_or_empty(folder / name))
    return merged
