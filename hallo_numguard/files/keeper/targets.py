"""What can be saved, and how. Recognised by its methods, so that no framework is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from hallo_numguard.core.errors import CheckpointFailed, InvalidInput


class Target(Protocol):
    """A run that can be saved and loaded.

    Attributes:
        saved_by: "deepspeed", "accelerate" or "torch".
    """

    saved_by: str

    def step(self) -> int | None:
        """Returns the number of optimizer steps so far; None if the run does not count them."""

    def save(self, folder: Path) -> None:
        """Writes everything into a folder. Every rank calls it."""

    def load(self, folder: Path) -> None:
        """Restores what was written. Every rank calls it."""


def target_for(run: Any) -> Target:
    """Returns the target for a run.

    Raises:
        InvalidInput: If the run cannot be saved.
    """
    if _can(run, "save_checkpoint", "load_checkpoint") and hasattr(run, "module"):
        return _Engine(run)
    if _can(run, "save_state", "load_state"):
        return _Accelerator(run)
    if isinstance(run, Mapping) and run and all(_can(part, "state_dict", "load_state_dict") for part in run.values()):
        return _Parts(run)
    raise InvalidInput(
        "expected a DeepSpeedEngine, an accelerate.Accelerator, or a dict of objects with state_dict and "
        f"load_state_dict, such as dict(model=model, optimizer=optimizer), got {type(run).__name__}"
    )


class _Engine:
    """DeepSpeed: every rank writes its shards."""

    saved_by = "deepspeed"

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def step(self) -> int | None:
        return int(self._engine.global_steps)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder))

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder))
        if path is None:
            raise CheckpointFailed(f"DeepSpeed found no checkpoint in {folder}")


class _Accelerator:
    """Accelerate: everything that `prepare` was given."""

    saved_by = "accelerate"

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def step(self) -> int | None:
        return None

    def save(self, folder: Path) -> None:
        self._accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self._accelerator.load_state(str(folder))


class _Parts:
    """Plain PyTorch: one file per object, written by rank 0."""

    saved_by = "torch"

    def __init__(self, parts: Mapping[str, Any]) -> None:
        for name in parts:
            if not name.isidentifier():
                raise InvalidInput(f"expected names of parts such as 'model', got {name!r}")
        self._parts = parts

    def step(self) -> int | None:
        return None

    def save(self, folder: Path) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        for name, part in self._parts.items():
            torch.save(part.state_dict(), folder / f"{name}.pt")

    def load(self, folder: Path) -> None:
        # Read everything before loading anything, so that an unreadable file leaves the run as it is.
        states = {
            name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True) for name in self._parts
        }
        for name, part in self._parts.items():
            part.load_state_dict(states[name])


def _can(run: Any, *methods: str) -> bool:
    return all(callable(getattr(run, method, None)) for method in methods)
