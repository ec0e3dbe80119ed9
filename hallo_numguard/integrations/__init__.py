"""Where the guard meets frameworks: when to look, at which tensors, and how a step is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hallo_numguard.config import GuardConfig, OverflowCallback
from hallo_numguard.errors import InvalidInput

if TYPE_CHECKING:
    from hallo_numguard.integrations.deepspeed import DeepSpeedGuard
    from hallo_numguard.integrations.transformers import TrainerGuard

# Where an Accelerator (after prepare), and a Trainer (once it trains), keep the engine.
_ENGINE_PATHS = ("deepspeed_engine_wrapped.engine", "accelerator.deepspeed_engine_wrapped.engine", "deepspeed")


def attach(
    target: Any, config: GuardConfig | None = None, on_overflow: OverflowCallback | None = None
) -> DeepSpeedGuard | TrainerGuard:
    """Guards a training engine: call it once, on every rank.

    Args:
        target: A `deepspeed.DeepSpeedEngine`, an `accelerate.Accelerator` after `prepare`, or a `transformers.Trainer`,
            also before `train()`, where the engine is made. ZeRO stages 0 to 3, with and without offload.
        config: What to do; see `GuardConfig`.
        on_overflow: Called on every rank with the same `OverflowReport` when a step's gradients are not finite. May
            return an action ("continue", "warn", "skip", "rollback", "raise") in place of the policy's, or None.

    Returns:
        The guard: `last_report`, `history`, `findings`, `detach()`.

    Raises:
        InvalidInput: If `target` is nothing of the kind, has no DeepSpeed engine, or is guarded already.
        UnsupportedDeepSpeed: If the engine, or the installed DeepSpeed, lacks what the guard needs.

    Cost: a scan of all parameters and buffers now; then one pass over this rank's gradients a step, in place of
    DeepSpeed's own passes.
    """
    config = config or GuardConfig()

    def guard_engine() -> DeepSpeedGuard | None:
        engine = engine_of(target)
        if engine is None:
            return None
        from hallo_numguard.integrations.deepspeed import DeepSpeedGuard

        return DeepSpeedGuard(engine, config, on_overflow)

    guard = guard_engine()
    if guard is not None:
        return guard
    if _is(target, "Trainer"):
        from hallo_numguard.integrations.transformers import TrainerGuard

        return TrainerGuard(target, guard_engine)
    if _is(target, "Accelerator"):
        raise InvalidInput(
            "this Accelerator has no DeepSpeed engine: call attach() after accelerator.prepare(), and launch with a "
            "DeepSpeed configuration (ACCELERATE_USE_CPU=true and cpu=True switch DeepSpeed off)"
        )
    raise InvalidInput(
        "attach() takes the engine that deepspeed.initialize returns, an accelerate.Accelerator after prepare() or a "
        f"transformers.Trainer, got {type(target).__name__}"
    )


def engine_of(target: Any) -> Any | None:
    """Returns the DeepSpeed engine that `target` is or has; None if there is none."""
    if _is(target, "DeepSpeedEngine"):
        return target
    for path in _ENGINE_PATHS:
        found = target
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None and _is(found, "DeepSpeedEngine"):
            return found
    return None


def _is(target: Any, name: str) -> bool:
    """Whether a class of that name is among those of `target`: nothing has to be imported to find out."""
    return any(base.__name__ == name for base in type(target).__mro__)
