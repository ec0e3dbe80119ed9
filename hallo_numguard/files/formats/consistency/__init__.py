"""What the files of one folder say of each other: index and shards, configuration and tensors, trackers and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency import model_config, shards, trackers, training_files
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.source import Source

_CHECKS = (shards.check, model_config.check, trackers.check, training_files.check)


def check(folder: Path, parts: Sequence[Source]) -> tuple[dict[str, Any], list[Finding]]:
    """Compares the files of a folder with each other.

    Args:
        folder: The folder.
        parts: What was read in it.

    Returns:
        Facts for the metadata of the folder, and findings.
    """
    contents = Contents.of(folder, parts)
    findings = {(one.kind, one.file, one.message): one for check in _CHECKS for one in check(contents)}
    damaged = {(one.kind, one.file): one for one in reversed(findings.values()) if one.kind == "damaged_file"}
    others = [one for one in findings.values() if one.kind != "damaged_file"]
    return trackers.facts(contents), [*reversed(damaged.values()), *others]
