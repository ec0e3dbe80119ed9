"""How the run is meant to be made, as far as anybody has said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BLOCKS = {"fp16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Plan:
    """What is known of the run; None or empty where nothing is.

    Attributes:
        world_size: Number of processes.
        zero_stage: Of DeepSpeed's ZeRO.
        dtype: That weights are trained in, such as "float16".
        config: DeepSpeed's configuration.
        param_groups: Hyperparameters of the optimizer's groups.
        environment: Variables of the process that will train; None if this is not it.
    """

    world_size: int | None = None
    zero_stage: int | None = None
    dtype: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    param_groups: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, str] | None = None

    @property
    def stage(self) -> int | None:
        """The stage of ZeRO: as was said, else the configuration's."""
        if self.zero_stage is not None or not self.config:
            return self.zero_stage
        stage = block(self.config, "zero_optimization").get("stage", 0)
        return stage if type(stage) is int else None

    @property
    def precision(self) -> str | None:
        """The dtype: as was said, else the configuration's."""
        if self.dtype is not None:
            return self.dtype
        return next((dtype for name, dtype in _BLOCKS.items() if is_on(self.config, name)), None)


def block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a block of DeepSpeed's configuration; empty if there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def is_on(config: Mapping[str, Any], name: str) -> bool:
    """Returns whether a block is switched on. The "auto" of the Hugging Face Trainer is not known yet."""
    return block(config, name).get("enabled") is True
