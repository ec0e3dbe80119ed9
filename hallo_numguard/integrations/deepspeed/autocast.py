"""The GradScaler of `torch_autocast` in float16, with which DeepSpeed scales the loss in place of its own scaler.

At stage 0 the engine calls `GradScaler.step(optimizer)`, which does not call the optimizer if a gradient is not finite,
and then `update`. At stages 1 to 3 the ZeRO optimizer checks by itself; the scaler only scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.integrations.torch_optim.grad_scaler import scaling_of

_LAST_WITHOUT_UPDATE = (0, 19, 8)


def scaler_of_engine(engine: Any) -> Any:
    """Returns the scaler that makes the steps of stage 0; None if there is none."""
    return getattr(engine, "torch_autocast_z0_gradscaler", None)


def scaling_of_scaler(scaler: Any) -> LossScaling:
    """Returns the state of a scaler. Synchronises where it is on a GPU."""
    return scaling_of(float(scaler.get_scale()))


def scaling_of_zero(optimizer: Any) -> LossScaling | None:
    """Returns the state of the scaler that a ZeRO optimizer has in place of DeepSpeed's own; None without one."""
    scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
    return None if scaler is None else replace(scaling_of_scaler(scaler), dynamic=False)


def known_bugs(optimizer: Any, release: tuple[int, ...]) -> Iterator[str]:
    """Yields that ZeRO never lowers the scale of such a scaler: it returns from a bad step before `update`."""
    scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None and release <= _LAST_WITHOUT_UPDATE:
        yield (
            "with torch_autocast in float16 at ZeRO stages 1 to 3 never lowers the loss scale after an overflow "
            f"(it is {scaler.get_scale():g} now): one that is too high skips every step. Use bfloat16, the fp16 block, "
            "or stage 0."
        )
