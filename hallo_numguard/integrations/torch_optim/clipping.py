"""Clipping where the norm of finite gradients is not finite in the dtype that torch computes it in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hallo_numguard.guard.readable import is_plain
from hallo_numguard.ops.api import multi_tensor_stats

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_MARGIN = 0.9  # torch rounds while it adds up


def largest_safe_norm(dtype: torch.dtype) -> float:
    """Returns a norm below which torch's own, of gradients of that dtype, is certainly finite."""
    if not dtype.is_floating_point:
        return math.inf
    added_up_in = torch.float64 if dtype is torch.float64 else torch.float32
    return _MARGIN * min(torch.finfo(dtype).max, math.sqrt(torch.finfo(added_up_in).max))


@torch.no_grad()
def clip_by_wide_norm(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor | None:
    """Clips finite gradients whose norm torch finds infinite, which it would multiply by 0. Synchronises.

    Returns:
        Their norm in float64; None if torch's norm is finite, or a gradient is not, or is no plain tensor: then nothing
        is done.
    """
    if not all(map(is_plain, gradients)):
        return None
    norms = [torch.linalg.vector_norm(gradient).to(gradients[0].device) for gradient in gradients]
    if torch.linalg.vector_norm(torch.stack(norms)).isfinite():
        return None
    table = multi_tensor_stats(list(gradients))
    norm = table.total_norm()
    if not norm.isfinite():
        return None
    factor = torch.clamp(max_norm / (norm + EPSILON), max=1.0).float()
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))  # a plain number would be rounded to the gradient's dtype first
    return norm
