"""The guard of a DeepSpeed engine."""

from hallo_numguard.integrations.deepspeed.guard import DeepSpeedGuard

__all__ = ["DeepSpeedGuard"]
