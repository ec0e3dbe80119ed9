"""A folder of checkpoints: saved completely or not at all, marked healthy or rejected, and rotated.

```
DIR/000007-step00000140/               a checkpoint, renamed into place once all of it is on disk
DIR/000007-step00000140.health.json    the later result of its check: "healthy", or "rejected" and why
DIR/.saving, DIR/.deleting             checkpoints in transition; killed processes leave them behind
```
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hallo_numguard.core.atomic_files import sync, write_whole
from hallo_numguard.core.documents import InvalidDocument, decode, encode
from hallo_numguard.files.manifest.listing import MANIFEST

META = "numguard.checkpoint.json"
_NAME = re.compile(r"(\d{6,})-step(\d{8,})")
_SAVING, _DELETING = ".saving", ".deleting"


@dataclass(frozen=True)
class Meta:
    """Facts saved beside a checkpoint.

    Attributes:
        step: Number of optimizer steps before it.
        loss: Loss of the last step, None if unknown.
        grad_norm: Unscaled gradient norm of the last step, None if unknown.
        loss_scale: Loss scale of the last step, None if unknown.
        rng: sha256 of the states of torch's random number generators on rank 0.
        world_size: Number of ranks that saved it.
        saved_by: "deepspeed", "accelerate" or "torch".
        saved_at: Time in seconds since 1970.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    loss_scale: float | None
    rng: str
    world_size: int
    saved_by: str
    saved_at: float


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        sequence: Number that grows with every save; step numbers come again after a rollback.
        step: Number of optimizer steps before it.
    """

    path: Path
    sequence: int
    step: int

    @property
    def meta(self) -> Meta:
        """Facts saved beside it.

        Raises:
            OSError: If they cannot be read.
            ValueError: If they are damaged.
        """
        document = json.loads((self.path / META).read_bytes())
        try:
            return decode(Meta, document)
        except InvalidDocument as error:
            raise ValueError(f"{META} is damaged: {error}") from error

    def __str__(self) -> str:
        return f"{self.path.name} (step {self.step})"


class Store:
    """The folder of checkpoints. With several ranks, rank 0 alone uses it.

    Args:
        folder: Path of the folder; created when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self) -> list[Checkpoint]:
        """Returns all checkpoints, the newest last."""
        found = ((path, _NAME.fullmatch(path.name)) for path in self._paths() if path.is_dir())
        named = [Checkpoint(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(named, key=lambda checkpoint: checkpoint.sequence)

    def begin(self, step: int) -> Checkpoint:
        """Returns an empty checkpoint to save into, after removing what killed processes left."""
        self._remove(self.folder / _SAVING)
        self._remove(self.folder / _DELETING)
        taken = [int(match[1]) for path in self._paths() if (match := _NAME.match(path.name))]
        sequence = max(taken, default=0) + 1
        path = self.folder / _SAVING / f"{sequence:06d}-step{step:08d}"
        path.mkdir(parents=True)
        return Checkpoint(path, sequence, step)

    def commit(self, saved: Checkpoint) -> Checkpoint:
        """Flushes a checkpoint from `begin` to the disk, and moves it into its place.

        Raises:
            OSError: If that fails.
        """
        for path in [*saved.path.rglob("*"), saved.path]:
            sync(path)
        final = replace(saved, path=self.folder / saved.path.name)
        saved.path.rename(final.path)
        sync(self.folder)
        saved.path.parent.rmdir()
        return final

    def mark(self, checkpoint: Checkpoint, status: str, reason: str) -> None:
        """Writes the result of a checkpoint's check, bound to its manifest."""
        document = {
            "schema_version": 1,
            "status": status,
            "reason": reason,
            "manifest": _manifest_of(checkpoint),
            "at": time.time(),
        }
        write_whole(_health_of(checkpoint), json.dumps(document, indent=1).encode())

    def status(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Returns "healthy", "rejected" or "unproved", and the reason."""
        health = _health_of(checkpoint)
        if not health.exists():
            return "unproved", "it was not followed by enough clean steps to be checked"
        try:
            document = json.loads(health.read_bytes())
            status, reason, manifest = str(document["status"]), str(document["reason"]), document["manifest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return "unproved", f"the result of its check cannot be read: {error!r}"
        try:
            is_same = manifest == _manifest_of(checkpoint)
        except OSError as error:
            return "unproved", f"its manifest cannot be read: {error.strerror}"
        return (status, reason) if is_same else ("unproved", "its manifest has changed since it was checked")

    def healthy(self) -> list[Checkpoint]:
        """Returns the checkpoints marked healthy, the newest last, without checking them again."""
        return [checkpoint for checkpoint in self.checkpoints() if self.status(checkpoint)[0] == "healthy"]

    def rotate(self, keep: int, spare: Iterable[Checkpoint] = ()) -> list[Checkpoint]:
        """Deletes and returns all checkpoints except the newest `keep`, the last healthy one, and those in `spare`."""
        checkpoints = self.checkpoints()
        kept = {*checkpoints[-keep:], *self.healthy()[-1:], *spare}
        deleted = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
        for checkpoint in deleted:
            trash = self.folder / _DELETING
            trash.mkdir(exist_ok=True)
            checkpoint.path.rename(trash / checkpoint.path.name)  # first, so that half of it is never taken for all
            _health_of(checkpoint).unlink(missing_ok=True)
        self._remove(self.folder / _DELETING)
        return deleted

    def _paths(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _remove(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)


def write_meta(folder: Path, meta: Meta) -> None:
    """Writes the facts about a checkpoint into its folder."""
    write_whole(folder / META, json.dumps(encode(meta), indent=1).encode())


def _health_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.with_name(f"{checkpoint.path.name}.health.json")


def _manifest_of(checkpoint: Checkpoint) -> str:
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()
