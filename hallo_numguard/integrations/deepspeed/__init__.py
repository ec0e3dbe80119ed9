"""The guard of a DeepSpeed engine."""

from typing import Any

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.guard.feeding_modules import Also
from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

__all__ = ["DeepSpeedGuard", "attach"]


def attach(engine: Any, config: GuardConfig, on_overflow: OverflowCallback | None, also: Also = ()) -> DeepSpeedGuard:
    """Guards a `deepspeed.DeepSpeedEngine`; see `hallo_numguard.attach`."""
    return DeepSpeedGuard(engine, config, on_overflow, also=also)
