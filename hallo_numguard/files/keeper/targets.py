"""Runs that can be saved, recognised by their methods, so that no framework is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.errors import CheckpointFailed, InvalidInput


@dataclass(frozen=True)
class Target:
    """How to save and load a run. Every rank calls the functions.

    Attributes:
        saved_by: "deepspeed", "accelerate" or "torch".
        save: Writes everything into a folder.
        load: Restores everything from such a folder.
        step: Returns the number of optimizer steps so far; None if the run does not count them.
    """

    saved_by: str
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    step: Callable[[], int | None] = lambda: None


def target_for(run: Any) -> Target:
    """Returns how to save and load a run.

    Raises:
        InvalidInput: If it cannot be saved.
    """
    if _can(run, "save_checkpoint", "load_checkpoint") and hasattr(run, "module"):
        return Target(
            "deepspeed",
            lambda folder: run.save_checkpoint(str(folder)),
            partial(_load_engine, run),
            lambda: int(run.global_steps),
        )
    if _can(run, "save_state", "load_state"):
        return Target(
            "accelerate", lambda folder: run.save_state(str(folder)), lambda folder: run.load_state(str(folder))
        )
    if isinstance(run, Mapping) and run and all(_can(part, "state_dict", "load_state_dict") for part in run.values()):
        for name in run:
            if not name.isidentifier():
                raise InvalidInput(f"expected names of parts such as 'model', got {name!r}")
        return Target("torch", partial(_save_parts, run), partial(_load_parts, run))
    raise InvalidInput(
        "expected a DeepSpeedEngine, an accelerate.Accelerator, or a dict of objects with state_dict and "
        f"load_state_dict, such as dict(model=model, optimizer=optimizer), got {type(run).__name__}"
    )


def _can(run: Any, *methods: str) -> bool:
    return all(callable(getattr(run, method, None)) for method in methods)


def _load_engine(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder))
    if path is None:
        raise CheckpointFailed(f"DeepSpeed found no checkpoint in {folder}")


def _save_parts(parts: Mapping[str, Any], folder: Path) -> None:
    """Plain PyTorch: one file per object, written by rank 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    for name, part in parts.items():
        torch.save(part.state_dict(), folder / f"{name}.pt")


def _load_parts(parts: Mapping[str, Any], folder: Path) -> None:
    # Read everything before loading anything, so that an unreadable file leaves the run unchanged.
    states = {name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True) for name in parts}
    for name, part in parts.items():
        part.load_state_dict(states[name])
