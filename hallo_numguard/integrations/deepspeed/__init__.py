"""The guard of a DeepSpeed engine."""

from hallo_numguard.integrations.deepspeed.engine_guard import DeepSpeedGuard

__all__ = ["DeepSpeedGuard"]
