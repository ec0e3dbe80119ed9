"""How a GradScaler is spoken to: what it tells of the loss scale, and what it wants to know of the gradients.

`GradScaler.step` hands itself to an optimizer whose `step` takes a `grad_scaler`, and then makes no pass over the
gradients of its own: the optimizer unscales, and says whether anything was not finite. An optimizer that it cannot see
this of (its `step` was replaced) is left `grad_scale` and `found_inf` as attributes, after a pass of the scaler's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from hallo_numguard.guard.loss_scaling import LossScaling

_SMALLEST = 2.0**-149  # what a scale has collapsed from when it is 0


def scale_of(scaler: Any) -> torch.Tensor:
    """Returns the loss scale, a number on the device. Does not wait for it."""
    scale: torch.Tensor = scaler._get_scale_async()
    return scale


def scaling_of(scale: float) -> LossScaling:
    """Returns what there is to be known. A GradScaler has no minimum, but below 1 nothing is gained any more."""
    return LossScaling(
        scale or _SMALLEST, dynamic=True, minimum=1.0, scaler="GradScaler", at_last="go on to skip every one"
    )


def has_unscaled(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the script has called `scaler.unscale_(optimizer)` in this step."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED


def tell(scaler: Any, optimizer: torch.optim.Optimizer, bad: bool) -> None:
    """Lets `scaler.update()` know whether the scale is to be lowered."""
    scale = scale_of(scaler)
    found_inf = torch.full((), float(bad), dtype=torch.float32, device=scale.device)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {scale.device: found_inf}
