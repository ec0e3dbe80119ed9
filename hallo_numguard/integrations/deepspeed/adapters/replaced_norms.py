"""DeepSpeed's gradient norms, taken from the guard's table; shared by the ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import OptimizerAdapter
from hallo_numguard.ops.table import StatsTable

_ZERO = torch.zeros((), dtype=torch.float64)


class ReplacedNorms:
    """Stands in for the methods in which a ZeRO optimizer computes the norm of a parameter group.

    Args:
        adapter: Adapter with the scan of the step under way.
        groups: DeepSpeed's own lists of parameters, one per group, compared by identity.
        master_partitions: Returns the flat master partitions, one per group, whose `grad` is read if a scan failed.
    """

    def __init__(
        self,
        adapter: OptimizerAdapter,
        groups: Sequence[Any],
        master_partitions: Callable[[], Sequence[torch.Tensor]],
    ) -> None:
        self._adapter = adapter
        self._optimizer = adapter.optimizer
        self._groups = groups
        self._master_partitions = master_partitions

    def get_grad_norm_direct(
        self, original: Callable[..., Any], gradients: Any, params: Sequence[Any], norm_type: float = 2
    ) -> Any:
        """Gives DeepSpeed one gradient of one element, whose norm is that of all."""
        group = self._group_of(params)
        if self._adapter.scan is None or group is None or norm_type != 2 or not params:
            return original(gradients, params, norm_type)
        return original([self._norm(group).reshape(1)], params[:1], norm_type)

    def note_parameter(self, _: Callable[..., Any], param: Any) -> None:
        """Notes that a parameter took part, without reading its gradient."""
        self._optimizer.norm_for_param_grads[self._optimizer.get_param_id(param)] = _ZERO

    def complete_grad_norm(self, original: Callable[..., Any], params: Sequence[Any]) -> Any:
        """Gives the norm of the group to one parameter. DeepSpeed's handling of unused parameters is unchanged."""
        norms = self._optimizer.norm_for_param_grads
        ids = [self._optimizer.get_param_id(parameter) for parameter in params]
        took_part = [index for index, param_id in enumerate(ids) if param_id in norms]
        group = self._group_of(params)
        if not took_part or group is None:
            return original(params)
        is_complete = len(took_part) == len(ids) or getattr(self._optimizer, "ignore_unused_parameters", True)
        stand_in = took_part[0]
        norms[ids[stand_in]] = self._norm(group)
        try:
            return original([params[stand_in]] if is_complete else params)
        finally:
            norms[ids[stand_in]] = _ZERO

    def _group_of(self, params: Sequence[Any]) -> int | None:
        return next((index for index, group in enumerate(self._groups) if group is params), None)

    def _norm(self, group: int) -> torch.Tensor:
        """0-dim float64: norm of this rank's gradients of a group, NaN if one is not finite."""
        scan = self._adapter.scan
        if scan is not None:
            return norm_of(scan.table[scan.groups[group]])
        # The scan of this step failed, and DeepSpeed's own passes during the backward pass were left out.
        gradient = self._master_partitions()[group].grad
        return _ZERO if gradient is None else torch.linalg.vector_norm(gradient.double())


def norm_of(table: StatsTable) -> torch.Tensor:
    """Returns the norm of all segments together: 0-dim float64, NaN if one is not finite."""
    return torch.where(table.any_nonfinite(), torch.nan, table.sumsq.sum().sqrt())
