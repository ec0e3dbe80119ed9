"""A folder as the checks see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency.sidecar_json import REMEDY
from hallo_numguard.files.formats.source import Source, TensorEntry


@dataclass(frozen=True)
class Contents:
    """The files of a folder, and what was read.

    Attributes:
        folder: The folder.
        parts: What was read: files of weights, and checkpoints of several files.
        files: Names of the files.
        folders: Names of the folders in it.
    """

    folder: Path
    parts: tuple[Source, ...]
    files: frozenset[str]
    folders: frozenset[str]

    @classmethod
    def of(cls, folder: Path, parts: Sequence[Source]) -> Contents:
        """Returns the contents of a folder."""
        children = list(folder.iterdir())
        folders = frozenset(child.name for child in children if child.is_dir())
        return cls(folder, tuple(parts), frozenset(child.name for child in children) - folders, folders)

    def part(self, name: str) -> Source | None:
        """Returns what was read of a file."""
        return next((part for part in self.parts if part.root == self.folder / name), None)

    def weights(self) -> Iterator[TensorEntry]:
        """Yields the weights and buffers in all files, but no state of optimizers."""
        for part in self.parts:
            yield from (entry for entry in part.entries if entry.role in ("parameter", "buffer"))

    def finding(
        self, kind: str, message: str, name: str = "", severity: str = "error", remedy: str = REMEDY
    ) -> Finding:
        """Returns a finding about a file of the folder, or about the folder itself."""
        return Finding(kind, message, severity=severity, file=str(self.folder / name), remedy=remedy)
