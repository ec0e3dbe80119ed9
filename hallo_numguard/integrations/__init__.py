"""Where the guard meets frameworks: when it runs, on which tensors, and how a step is skipped."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import guards_are_disabled
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.integrations.oldest_versions import check_version

if TYPE_CHECKING:
    from hallo_numguard.guard.feeding_modules import Also
    from hallo_numguard.guard.guard import Guard
    from hallo_numguard.integrations.lightning import NumGuardCallback as LightningNumGuardCallback
    from hallo_numguard.integrations.transformers import NumGuardCallback

__all__ = ["GROUP", "LightningNumGuardCallback", "NumGuardCallback", "attach", "engine_of"]

GROUP = "hallo_numguard.integrations"
"""Group of entry points: each is called as `attach` was, and returns a `Guard`, or None for another kind of target.
`also` is left out where it is empty."""

# Module with the function `attach(target, config, on_overflow, also)`, by package and class of the target: nothing has
# to be imported to find out what a target is.
_BUILT_IN = {
    ("deepspeed", "DeepSpeedEngine"): "deepspeed",
    ("accelerate", "Accelerator"): "accelerate",
    ("transformers", "Trainer"): "transformers",
    ("lightning", "Trainer"): "lightning",
    ("pytorch_lightning", "Trainer"): "lightning",
}
_CALLBACKS = {
    "NumGuardCallback": "transformers:NumGuardCallback",
    "LightningNumGuardCallback": "lightning:NumGuardCallback",
}
# Where an Accelerator (after prepare), and Trainers (once they train), keep the engine.
_ENGINE_PATHS = (
    "deepspeed_engine_wrapped.engine",
    "accelerator.deepspeed_engine_wrapped.engine",
    "deepspeed",
    "strategy.model",
)


def attach(
    target: Any,
    config: GuardConfig | None = None,
    on_overflow: OverflowCallback | None = None,
    also: Also = (),
) -> Guard:
    """Guards a training run: call it once, on every rank.

    Args:
        target: A `deepspeed.DeepSpeedEngine` (ZeRO stages 0 to 3, with and without offload), an
            `accelerate.Accelerator` after `prepare`, a `transformers.Trainer` or a `lightning.pytorch.Trainer` before
            it trains, or what another package's entry point `hallo_numguard.integrations` takes. Plain PyTorch has
            `GuardedOptimizer`.
        config: Settings; see `GuardConfig`.
        on_overflow: Called on every rank with the same `OverflowReport` when a step's gradients are not finite. It may
            return an action ("continue", "warn", "skip", "rollback", "raise") in place of the policy's, or None.
        also: Frozen modules outside of the model that feed it, as a list or by name, the same on all ranks: an image
            encoder, a text encoder, a reward model. They are scanned now, and where what they return is not finite,
            the report names the module inside that made it. The calls of a step are kept, up to 256 MiB.

    Returns:
        The guard, with `last_report`, `history`, `findings` and `detach()`. Where the policy says raise,
        `NumericsError` comes out of the step; a `transformers.Trainer` stops training, cleans up, and `train()` raises
        it. Until `detach()` the framework's saves raise it too where they would write what is not finite; see
        `Policy.on_bad_save`. With HALLO_NUMGUARD_DISABLE=1 the guard of nothing: `target` is left alone.

    Raises:
        InvalidInput: If `target` is none of these, was not prepared, or is guarded already.
        UnsupportedDeepSpeed: If the engine, or the installed DeepSpeed, lacks what the guard needs.

    Cost: a scan of all parameters and buffers now; then one pass per step over this rank's gradients, in place of
    DeepSpeed's own passes; one pass over what is saved before each save.
    """
    if guards_are_disabled():
        from hallo_numguard.guard.guard import DisabledGuard

        return DisabledGuard()
    config = config or GuardConfig()
    for (package, name), module in _BUILT_IN.items():
        if _is(target, package, name):
            check_version(package)
            guard: Guard = _load(f"{module}:attach")(target, config, on_overflow, also)
            return guard
    for offered, integration in _offered():
        guard = integration(target, config, on_overflow, *([also] if also else []))
        if guard is not None:
            return _checked(guard, offered)
    raise InvalidInput(
        "attach() takes the engine that deepspeed.initialize returns, an accelerate.Accelerator after prepare(), a "
        f"transformers.Trainer or a lightning.pytorch.Trainer{_others()}, got {type(target).__name__}; for a "
        "torch.optim.Optimizer there is GuardedOptimizer(optimizer, model)"
    )


def engine_of(target: Any) -> Any | None:
    """Returns the DeepSpeed engine that `target` is or has; None if there is none."""
    if _is(target, "deepspeed", "DeepSpeedEngine"):
        return target
    for path in _ENGINE_PATHS:
        found = target
        for name in path.split("."):
            found = getattr(found, name, None)
        if _is(found, "deepspeed", "DeepSpeedEngine"):
            return found
    return None


def _is(target: Any, package: str, name: str) -> bool:
    """Whether `target` is an instance of a class of that package and name."""
    return any(base.__name__ == name and base.__module__.split(".")[0] == package for base in type(target).__mro__)


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _offered() -> Iterator[tuple[str, Any]]:
    """Names and targets of the integrations of other packages."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            yield point.name, point.load()
        except Exception as error:
            raise InvalidInput(f"the integration {point.name!r} ({point.value}) cannot be loaded: {error}") from error


def _checked(guard: Any, offered: str) -> Guard:
    missing = [name for name in ("last_report", "history", "findings", "detach") if not hasattr(guard, name)]
    if missing:
        raise InvalidInput(f"the integration {offered!r} gave a {type(guard).__name__}, which lacks {missing[0]}")
    return cast("Guard", guard)


def _others() -> str:
    names = sorted(point.name for point in entry_points(group=GROUP))
    return f" (or what the integrations {', '.join(names)} take)" if names else ""


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_CALLBACKS[name])
