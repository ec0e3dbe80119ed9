"""A folder of checkpoints: how one comes into it whole, what is known of it, and which are given up.

```
DIR/000007-step00000140/               a checkpoint: only ever renamed into its place when all of it is on the disk
DIR/000007-step00000140.health.json    what was found out about it later: "healthy", or "rejected" and why
DIR/.saving, DIR/.deleting             what is not there yet, and no more; a process that was killed leaves them
```
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hallo_numguard.core.atomic_files import sync, write_whole
from hallo_numguard.core.documents import encode
from hallo_numguard.files.manifest.file_names import MANIFEST

META = "numguard.checkpoint.json"
_NAME = re.compile(r"(\d{6,})-step(\d{8,})")
_SAVING, _DELETING = ".saving", ".deleting"  # folders in it of what is not there yet, and no more


@dataclass(frozen=True)
class Meta:
    """What is written beside a checkpoint when it is saved.

    Attributes:
        step: Optimizer steps that it has seen.
        loss, grad_norm, loss_scale: Of the last step before; None if they were not known.
        rng: SHA-256 of the states of torch's random number generators on rank 0.
        world_size: Number of ranks that saved it.
        saved_by: "deepspeed", "accelerate" or "torch".
        saved_at: Seconds since 1970.
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
    """One that is whole.

    Attributes:
        path: Its folder.
        sequence: Later ones have higher numbers; steps come again after a rollback, these do not.
        step: Optimizer steps that it has seen.
    """

    path: Path
    sequence: int
    step: int

    @property
    def meta(self) -> Meta:
        """What was written beside it.

        Raises:
            OSError, ValueError: If that is not there, or not that.
        """
        document = json.loads((self.path / META).read_bytes())
        try:
            values = {field.name: document[field.name] for field in fields(Meta)}
            for name in ("loss", "grad_norm", "loss_scale"):
                values[name] = None if values[name] is None else float(values[name])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{META} is not what was written there: {error!r}") from error
        return Meta(**values)

    def __str__(self) -> str:
        return f"{self.path.name} (step {self.step})"


class Store:
    """The folder, for one process: with several, rank 0's.

    Args:
        folder: Is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self) -> list[Checkpoint]:
        """Returns all there are, the newest last."""
        found = ((path, _NAME.fullmatch(path.name)) for path in self._paths() if path.is_dir())
        named = [Checkpoint(path, int(match[1]), int(match[2])) for path, match in found if match]
        return sorted(named, key=lambda checkpoint: checkpoint.sequence)

    def begin(self, step: int) -> Checkpoint:
        """Returns an empty checkpoint to save into. What killed processes left is removed."""
        self._remove(self.folder / _SAVING)
        self._remove(self.folder / _DELETING)
        taken = [int(match[1]) for path in self._paths() if (match := _NAME.match(path.name))]
        sequence = max(taken, default=0) + 1
        path = self.folder / _SAVING / f"{sequence:06d}-step{step:08d}"
        path.mkdir(parents=True)
        return Checkpoint(path, sequence, step)

    def commit(self, saved: Checkpoint) -> Checkpoint:
        """Puts a checkpoint that `begin` gave in its place, once all of it is on the disk.

        Raises:
            OSError: If it does not get there.
        """
        for path in [*saved.path.rglob("*"), saved.path]:
            sync(path)
        final = replace(saved, path=self.folder / saved.path.name)
        saved.path.rename(final.path)
        sync(self.folder)
        saved.path.parent.rmdir()
        return final

    def mark(self, checkpoint: Checkpoint, status: str, reason: str) -> None:
        """Writes down what was found out about a checkpoint, bound to its manifest."""
        document = {
            "schema_version": 1,
            "status": status,
            "reason": reason,
            "manifest": _manifest_of(checkpoint),
            "at": time.time(),
        }
        write_whole(_health_of(checkpoint), json.dumps(document, indent=1).encode())

    def status(self, checkpoint: Checkpoint) -> tuple[str, str]:
        """Returns "healthy", "rejected" or "unproved", and why."""
        health = _health_of(checkpoint)
        if not health.exists():
            return "unproved", "it was not followed by enough clean steps, and not looked at"
        try:
            document = json.loads(health.read_bytes())
            status, reason, manifest = str(document["status"]), str(document["reason"]), document["manifest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return "unproved", f"what was found out about it cannot be read: {error!r}"
        try:
            is_same = manifest == _manifest_of(checkpoint)
        except OSError as error:
            return "unproved", f"its manifest cannot be read: {error.strerror}"
        return (status, reason) if is_same else ("unproved", "its manifest is another than when it was looked at")

    def healthy(self) -> list[Checkpoint]:
        """Returns those that were found healthy, the newest last. Does not look at their contents again."""
        return [checkpoint for checkpoint in self.checkpoints() if self.status(checkpoint)[0] == "healthy"]

    def rotate(self, keep: int, spare: Iterable[Checkpoint] = ()) -> list[Checkpoint]:
        """Deletes all but the newest `keep`, the last healthy one, and those to be spared; returns what was deleted."""
        there = self.checkpoints()
        kept = {*there[-keep:], *self.healthy()[-1:], *spare}
        deleted = [checkpoint for checkpoint in there if checkpoint not in kept]
        for checkpoint in deleted:
            going = self.folder / _DELETING
            going.mkdir(exist_ok=True)
            checkpoint.path.rename(going / checkpoint.path.name)  # at once, so that half of it is never taken for all
            _health_of(checkpoint).unlink(missing_ok=True)
        self._remove(self.folder / _DELETING)
        return deleted

    def _paths(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _remove(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)


def write_meta(folder: Path, meta: Meta) -> None:
    """Writes what is known of a checkpoint into it."""
    write_whole(folder / META, json.dumps(encode(meta), indent=1).encode())


def _health_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.with_name(f"{checkpoint.path.name}.health.json")


def _manifest_of(checkpoint: Checkpoint) -> str:
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()
