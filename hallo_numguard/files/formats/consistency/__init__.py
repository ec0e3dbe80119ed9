"""What the files of one folder say of each other: index and shards, configuration and tensors, trackers and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency import model_config, shards, trackers, training_files
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.source import Source

_LOST = ("missing_shard", "missing_tensor", "damaged_file", "no_values", "escape")  # then tensors are missing anyhow


def check(folder: Path, parts: Sequence[Source]) -> tuple[dict[str, Any], list[Finding]]:
    """Compares the files of a folder with each other.

    Args:
        folder: The folder.
        parts: What was read in it.

    Returns:
        Facts for the metadata of the folder, and findings.
    """
    contents = Contents.of(folder, parts)
    found = list(shards.check(contents))
    is_whole = not any(one.kind in _LOST for one in (*found, *(one for part in parts for one in part.findings)))
    found += model_config.check(contents, is_whole)
    found += [*trackers.check(contents), *training_files.check(contents)]
    findings = {(one.kind, one.file, one.message): one for one in found}
    damaged = {(one.kind, one.file): one for one in reversed(findings.values()) if one.kind == "damaged_file"}
    others = [one for one in findings.values() if one.kind != "damaged_file"]
    return trackers.facts(contents), [*reversed(damaged.values()), *others]
