"""What the guard reads of an optimizer to tell what an update was made with: settings, state, master copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hallo_numguard.guard.state_tensors import state_tensors


class StatePart(NamedTuple):
    """A tensor of the optimizer's state that has a number for each element of a part of a weight.

    Attributes:
        name: Its name in the state, as in "exp_avg".
        values: The tensor, flat.
        start: Flat index, in this rank's part of the weight, of the element that the first number belongs to.
        is_master: Whether it is a copy of the weight in a wider dtype, which takes the updates.
    """

    name: str
    values: torch.Tensor
    start: int = 0
    is_master: bool = False


@dataclass(frozen=True)
class WeightState:
    """What an optimizer keeps for one weight, on this rank.

    Attributes:
        parts: Tensors with a number for each element.
        numbers: Numbers that belong to the weight as a whole, such as "step".
    """

    parts: Sequence[StatePart] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerView:
    """The optimizer behind a guarded model.

    Attributes:
        name: Returns the name of its class.
        groups: Returns its parameter groups, as in `torch.optim.Optimizer.param_groups`.
        group_of: Returns the number of the group that a parameter of the model is in; None if that is unknown.
        state_of: Returns what it keeps for a parameter of the model. Not for the hot path.
    """

    name: Callable[[], str] = lambda: "the optimizer"
    groups: Callable[[], Sequence[Mapping[str, Any]]] = lambda: ()
    group_of: Callable[[torch.Tensor], int | None] = lambda _: None
    state_of: Callable[[torch.Tensor], WeightState] = lambda _: WeightState()


def view_of(optimizer: Any) -> OptimizerView:
    """Returns the view of an optimizer of torch, whose parameters are the model's own."""

    def group_of(parameter: torch.Tensor) -> int | None:
        groups = enumerate(optimizer.param_groups)
        return next((number for number, group in groups if any(item is parameter for item in group["params"])), None)

    def state_of(parameter: torch.Tensor) -> WeightState:
        parts = [
            StatePart(name, flat)
            for name, tensor in state_tensors(optimizer, parameter)
            if (flat := _flat(tensor)).numel() == _flat(parameter).numel()
        ]
        return WeightState(parts, numbers_of(optimizer.state.get(parameter, {})))

    return OptimizerView(lambda: type(optimizer).__name__, lambda: optimizer.param_groups, group_of, state_of)


def numbers_of(state: Mapping[str, Any]) -> dict[str, float]:
    """Returns the single numbers of a state, such as a step count. Waits for those on a device."""
    found = {}
    for name, value in state.items():
        is_single = isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()
        if is_single or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            found[str(name)] = float(value)
    return found


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach().reshape(-1)
