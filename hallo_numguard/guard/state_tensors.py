"""The tensors of a torch optimizer's state, and where they stand in a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.tracing.nested import tensors_in


def state_tensors(optimizer: Any, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and tensors of a state with a number for each element of a parameter, or for several.

    A step count is none, nor is a state of all parameters that is kept with the first (LBFGS).
    """
    for name, value in optimizer.state.get(parameter, {}).items():
        for key, tensor in tensors_in(str(name), value):
            if tensor.shape == parameter.shape or (tensor.dim() > 0 and tensor.numel() <= parameter.numel()):
                yield key, tensor


def state_piece(whole: Piece, numel: int, state_numel: int) -> Piece:
    """Returns where a tensor of the state stands: for each element, or, like scales, for several that are adjacent.

    Args:
        whole: This rank's part of the parameter.
        numel: Number of elements of that part.
        state_numel: Number of elements of the tensor.
    """
    step, rest = divmod(numel, max(1, state_numel))
    if step == 1 and not rest:
        return whole
    return Piece(whole.parameter, whole.start, 1, 0 if rest else step)
