"""Where the guard meets frameworks: when to look, at which tensors, and how a step is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hallo_numguard.config import GuardConfig, OverflowCallback
from hallo_numguard.errors import InvalidInput

if TYPE_CHECKING:
    from hallo_numguard.integrations.deepspeed import DeepSpeedGuard


def attach(
    target: Any, config: GuardConfig | None = None, on_overflow: OverflowCallback | None = None
) -> DeepSpeedGuard:
    """Guards a training engine: call it once, on every rank, after `deepspeed.initialize`.

    Args:
        target: A `deepspeed.DeepSpeedEngine` with ZeRO stage 1 or 2.
        config: What to do; see `GuardConfig`.
        on_overflow: Called on every rank with the same `OverflowReport` when a step's gradients are not finite. May
            return an action ("continue", "warn", "skip", "raise") in place of the policy's, or None.

    Returns:
        The guard: `last_report`, `history`, `findings`, `detach()`.

    Raises:
        InvalidInput: If `target` is not such an engine, or is guarded already.
        UnsupportedDeepSpeed: If the engine, or the installed DeepSpeed, lacks what the guard needs.

    Cost: a scan of all parameters and buffers now; then one pass over this rank's gradients a step.
    """
    if not any(base.__name__ == "DeepSpeedEngine" for base in type(target).__mro__):
        raise InvalidInput(f"attach() takes the engine that deepspeed.initialize returns, got {type(target).__name__}")
    from hallo_numguard.integrations.deepspeed import DeepSpeedGuard

    return DeepSpeedGuard(target, config or GuardConfig(), on_overflow)
