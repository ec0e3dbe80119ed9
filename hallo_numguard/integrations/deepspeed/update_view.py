"""What the guard reads of the optimizer inside of an engine's optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hallo_numguard.guard.optimizer_view import OptimizerView, StatePart, WeightState, numbers_of, view_of
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import OptimizerAdapter, is_moment


def engine_view(adapter: OptimizerAdapter) -> OptimizerView:
    """Returns the view of the optimizer that an adapter is for.

    Its groups are those of the torch optimizer inside, whose parameters are flat; the weights are found by DeepSpeed's
    lists of them, and their state by the adapter.
    """
    if isinstance(adapter.optimizer, torch.optim.Optimizer):
        return view_of(adapter.optimizer)
    inner = getattr(adapter.optimizer, "optimizer", adapter.optimizer)
    return OptimizerView(
        lambda: type(inner).__name__,
        lambda: inner.param_groups,
        lambda parameter: _group_of(adapter, parameter),
        lambda parameter: _state_of(adapter, inner, parameter),
    )


def _group_of(adapter: OptimizerAdapter, parameter: torch.Tensor) -> int | None:
    groups = enumerate(adapter.parameter_groups(adapter.optimizer))
    number = next((number for number, group in groups if any(item is parameter for item in group)), None)
    parent: Mapping[int, int] = getattr(adapter.optimizer, "sub_group_to_group_id", {})  # of stage 3
    return number if number is None else parent.get(number, number)


def _state_of(adapter: OptimizerAdapter, inner: Any, parameter: torch.Tensor) -> WeightState:
    own = adapter.state_parts_of(adapter.positions.get(parameter))
    state: Mapping[str, Any] = next(iter(inner.state.values()), {})
    moments = [str(name) for name, value in state.items() if is_moment(name, value)]
    start = 0 if hasattr(parameter, "ds_tensor") else None  # where the weight is sliced as well, its part begins there
    return WeightState(list(_named(own, moments, start)), numbers_of(state))


def _named(own: Sequence[tuple[torch.Tensor, Any]], moments: Sequence[str], start: int | None) -> Iterator[StatePart]:
    """Names for an adapter's tensors of one weight: its master copy, if there is one, comes before its moments."""
    has_master = len(own) > len(moments)
    names = ["master copy", *moments] if has_master else list(moments)
    for place, (tensor, piece) in enumerate(own):
        name = names[place] if place < len(names) else f"state {place}"
        begin = piece.start if start is None else start
        yield StatePart(name, tensor.detach().reshape(-1), begin, is_master=has_master and place == 0)
