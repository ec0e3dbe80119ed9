"""What an integration gives the session: the model that is guarded, and what it holds of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece

Forward = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
"""Calls the model with positional and keyword arguments, as the framework does."""


@dataclass(frozen=True)
class Scanned:
    """One pass over this rank's gradients.

    Attributes:
        packed: int64 [pieces, 8], a `StatsTable.packed`.
        pieces: What each row is of: parameters by their position in the session's list.
        groups: The rows of each of the optimizer's parameter groups.
    """

    packed: torch.Tensor
    pieces: Sequence[Piece]
    groups: Sequence[slice] = ()


@dataclass(frozen=True)
class Model:
    """What there is to be named.

    Attributes:
        parameters: In registration order.
        buffers: Likewise.
        sliced_gradients: Whether every rank holds another slice of the gradients; else each holds all of them.
        scan_state: Reads the optimizer's own tensors once: moments, master copies.
        sliced_state: Whether every rank holds another slice of those.
        device: Where small reductions between ranks are made.
        module: Whose forward is called in training: names its arguments. None if nobody shows the calls.
        forward: Calls it once more, as the framework does; None if that cannot be.
        backward_again: Whether gradients with respect to its parameters can then be asked for by name.
        settings: The framework's configuration, to be kept with what was found.
        can_go_back: Tells whether whoever carries out what the session says can call `go_back` when a step is over; the
            same on every rank.
    """

    parameters: list[NamedTensor]
    buffers: list[NamedTensor]
    sliced_gradients: bool
    scan_state: Callable[[], Scanned]
    sliced_state: bool
    device: torch.device
    module: nn.Module | None = None
    forward: Forward | None = None
    backward_again: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    can_go_back: Callable[[], bool] = lambda: False
