"""The protocol between a GradScaler and its optimizer: the loss scale, and whether the gradients are finite.

`GradScaler.step` hands itself to an optimizer whose `step` takes a `grad_scaler`, and then makes no pass over the
gradients of its own: the optimizer unscales, and reports what was not finite. For other optimizers (whose `step` was
replaced) the scaler makes its pass, and sets the attributes `grad_scale` and `found_inf`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from hallo_numguard.guard.loss_scaling import LossScaling

_SMALLEST = 2.0**-149  # stands for a scale that has collapsed to 0


def scale_of(scaler: Any) -> torch.Tensor:
    """Returns the loss scale, a number on the device. Does not wait for it."""
    scale: torch.Tensor = scaler._get_scale_async()
    return scale


def scaling_of(scale: float) -> LossScaling:
    """Returns the scaler's state. A GradScaler has no minimum, but nothing is gained below 1."""
    return LossScaling(
        scale or _SMALLEST, dynamic=True, minimum=1.0, scaler="GradScaler", at_minimum="go on to skip every one"
    )


def has_unscaled(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the script has called `scaler.unscale_(optimizer)` in this step."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED


def set_found_inf(scaler: Any, optimizer: torch.optim.Optimizer, bad: bool) -> None:
    """Sets the flag by which `scaler.update()` lowers the scale."""
    scale = scale_of(scaler)
    found_inf = torch.full((), float(bad), dtype=torch.float32, device=scale.device)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {scale.device: found_inf}
