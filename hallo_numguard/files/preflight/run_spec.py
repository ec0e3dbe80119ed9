"""Known facts about the start of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hallo_numguard.files.formats.deepspeed_checkpoint import configured_dtype


@dataclass(frozen=True)
class RunSpec:
    """Facts about a run to be started; None or empty if unknown.

    Attributes:
        world_size: Number of processes.
        zero_stage: ZeRO stage as given by the user.
        dtype: Training dtype as given by the user, such as "float16".
        config: DeepSpeed configuration.
        param_groups: Hyperparameters of each parameter group of the optimizer.
        environment: Environment variables of the training process; None outside of it.
    """

    world_size: int | None = None
    zero_stage: int | None = None
    dtype: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    param_groups: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, str] | None = None

    @property
    def stage(self) -> int | None:
        """ZeRO stage as given, else that of the configuration."""
        if self.zero_stage is not None or not self.config:
            return self.zero_stage
        stage = block(self.config, "zero_optimization").get("stage", 0)
        return stage if type(stage) is int else None

    @property
    def precision(self) -> str | None:
        """Training dtype as given, else that of the configuration."""
        return configured_dtype(self.config) if self.dtype is None else self.dtype


def block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a block of the DeepSpeed configuration; empty if there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def is_enabled(config: Mapping[str, Any], name: str) -> bool:
    """Returns whether a block is enabled. "auto", from the Hugging Face Trainer, does not count."""
    return block(config, name).get("enabled") is True
