"""The guard of an Accelerator: of its DeepSpeed engine, or of the optimizers that it has prepared."""

from __future__ import annotations

from typing import Any

from hallo_numguard.config import GuardConfig, OverflowCallback
from hallo_numguard.errors import InvalidInput
from hallo_numguard.integrations import Guard, engine_of


def guard_accelerator(accelerator: Any, config: GuardConfig, on_overflow: OverflowCallback | None) -> Guard:
    """Guards what an Accelerator has prepared; see `attach`."""
    engine = engine_of(accelerator)
    if engine is not None:
        from hallo_numguard.integrations.deepspeed.guard import DeepSpeedGuard

        return DeepSpeedGuard(engine, config, on_overflow)
    raise InvalidInput("this Accelerator has prepared no optimizer: call attach() after accelerator.prepare()")
