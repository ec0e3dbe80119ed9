"""Replace mode: the guard's pass over the gradients stands in for DeepSpeed's own.

Only the local part is replaced, what one rank computes of its own gradients. Collectives, the decision and the clipping
stay DeepSpeed's, because its methods still run: they are given a gradient of one element in place of all of them, whose
norm is that of all, and which is NaN if any of them is not finite.

| class | its pass that is not made | how it gets ours |
|---|---|---|
| ZeRO-1/2 | `has_overflow_partitioned_grads_serial` | returns the flag of the table |
| | `get_grad_norm_direct(gradients, params)` | is called with one element |
| ZeRO-1/2 offload | `update_offload_overflow_tracker(grad)`, every backward | sets `local_overflow` before the step |
| | `set_norm_for_param_grad`, `.._in_gpu`, every backward | notes only that the parameter took part |
| | `complete_grad_norm_calculation_for_cpu_offload(params)` | is called with one parameter that has it all |
| ZeRO-3 | `has_overflow`: two passes over `grad_partitions_flat_buffer` | finds one element there |
| | `get_grad_norm_direct(gradients, params)` | is called with one element |
| ZeRO-3 offload | `_constant_buffered_norm2(grad)`, every backward | notes only that the parameter took part |
| | `complete_grad_norm_calculation_for_cpu_offload(params)` | is called with one parameter that has it all |
| FP16_* | `overflow_checker.has_overflow_serial(params)` | returns the flag of the table |
| stage 0 in float32 | the norm in `engine.clip_fp32_gradients` | `clip` makes the same steps with the table's norm |

BF16_Optimizer makes no pass that an instance could be relieved of: it is observed. So is whatever changes gradients
between the scan and the norm (Muon).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import Scanned
from hallo_numguard.integrations.deepspeed.version import kind_of
from hallo_numguard.integrations.patches import Seams

_log = logging.getLogger("hallo_numguard")


class Replacement:
    """Answers DeepSpeed's questions about this step's gradients from the guard's table.

    Args:
        optimizer: DeepSpeed's.
        seams: Where its methods are replaced.
    """

    def __init__(self, optimizer: Any, seams: Seams) -> None:
        self._optimizer = optimizer
        self._seams = seams
        self._scanned: Scanned | None = None
        self._groups: Sequence[Any] = ()  # DeepSpeed's lists of parameters
        reason = _not_ours(optimizer)
        if reason is not None:
            _log.info("hallo_numguard observes and replaces nothing: %s", reason)
        elif kind_of(optimizer, "DeepSpeedZeroOptimizer_Stage3"):
            self._replace_stage3()
        elif kind_of(optimizer, "DeepSpeedZeroOptimizer"):
            self._replace_stages_1_and_2()
        elif hasattr(getattr(optimizer, "overflow_checker", None), "has_overflow_serial"):
            seams.wrap(optimizer.overflow_checker, "has_overflow_serial", self._has_overflow_serial)

    def begin(self, scanned: Scanned | None) -> None:
        """Takes the table of the step that begins; None if there is none, and DeepSpeed has to look itself."""
        self._scanned = scanned
        if hasattr(self._optimizer, "local_overflow") and self._optimizer.cpu_offload:
            flats = [flat.grad for flat in self._optimizer.single_partition_of_fp32_groups]
            bad = _is_bad(scanned.packed) if scanned is not None else _torch_is_bad(flats)
            self._optimizer.local_overflow = bool(bad)

    def end(self) -> None:
        """The step is over."""
        self._scanned = None

    # -- stages 1 and 2 ----------------------------------------------------------------------------------------------

    def _replace_stages_1_and_2(self) -> None:
        optimizer, wrap = self._optimizer, self._seams.wrap
        self._groups = optimizer.params_in_partition
        if not optimizer.cpu_offload:
            wrap(optimizer, "has_overflow_partitioned_grads_serial", self._has_overflow_partitioned_grads_serial)
            wrap(optimizer, "get_grad_norm_direct", self._get_grad_norm_direct)
            return
        wrap(optimizer, "update_offload_overflow_tracker", _nothing)
        for name in ("set_norm_for_param_grad", "set_norm_for_param_grad_in_gpu"):
            wrap(optimizer, name, self._note_parameter)
        wrap(optimizer, "complete_grad_norm_calculation_for_cpu_offload", self._complete_grad_norm)

    def _has_overflow_partitioned_grads_serial(self, original: Callable[..., Any]) -> Any:
        return original() if self._scanned is None else _is_bad(self._scanned.packed).reshape(1)

    def _get_grad_norm_direct(
        self, original: Callable[..., Any], gradients: Any, params: Sequence[Any], norm_type: float = 2
    ) -> Any:
        group = self._group_of(params)
        if self._scanned is None or group is None or norm_type != 2 or not params:
            return original(gradients, params, norm_type)
        return original([self._norm(group).reshape(1)], params[:1], norm_type)

    # -- stage 3 -----------------------------------------------------------------------------------------------------

    def _replace_stage3(self) -> None:
        optimizer, wrap = self._optimizer, self._seams.wrap
        self._groups = optimizer.fp16_groups
        wrap(optimizer, "has_overflow", self._has_overflow_stage3)
        if not optimizer.offload_optimizer:
            wrap(optimizer, "get_grad_norm_direct", self._get_grad_norm_direct)
            return
        wrap(optimizer, "_constant_buffered_norm2", lambda _, gradient, *__: torch.zeros((), device=gradient.device))
        wrap(optimizer, "complete_grad_norm_calculation_for_cpu_offload", self._complete_grad_norm)

    def _has_overflow_stage3(self, original: Callable[..., Any], partition_gradients: bool = True) -> Any:
        if self._scanned is None or not partition_gradients:
            return original(partition_gradients)
        real = self._optimizer.grad_partitions_flat_buffer
        bad = _is_bad(self._scanned.packed)
        self._optimizer.grad_partitions_flat_buffer = torch.where(bad, torch.nan, 0.0).reshape(1)
        try:
            return original(partition_gradients)
        finally:
            self._optimizer.grad_partitions_flat_buffer = real

    # -- offload -----------------------------------------------------------------------------------------------------

    def _note_parameter(self, _: Callable[..., Any], param: Any) -> None:
        self._optimizer.norm_for_param_grads[self._optimizer.get_param_id(param)] = _ZERO

    def _complete_grad_norm(self, original: Callable[..., Any], params: Sequence[Any]) -> Any:
        """Lets one parameter stand for all. What DeepSpeed does about parameters that took no part stays as it is."""
        norms = self._optimizer.norm_for_param_grads
        ids = [self._optimizer.get_param_id(parameter) for parameter in params]
        took_part = [index for index, param_id in enumerate(ids) if param_id in norms]
        group = self._group_of(params)
        if not took_part or group is None:
            return original(params)
        all_of_them = len(took_part) == len(ids) or getattr(self._optimizer, "ignore_unused_parameters", True)
        stand_in = took_part[0]
        norms[ids[stand_in]] = self._norm(group)
        try:
            return original([params[stand_in]] if all_of_them else params)
        finally:
            norms[ids[stand_in]] = _ZERO

    # -- stage 0 -----------------------------------------------------------------------------------------------------

    def _has_overflow_serial(self, original: Callable[..., Any], params: Any) -> Any:
        return original(params) if self._scanned is None else bool(_is_bad(self._scanned.packed))

    def clip(self, scanned: Scanned, gradients: Sequence[torch.Tensor], max_norm: float, ranks: Ranks) -> None:
        """Clips as DeepSpeed's `clip_grad_norm_` does where there is no model parallelism, its own norm left out.

        All ranks hold the same gradients; the mean over them is DeepSpeed's, and makes them clip by the same bits.
        """
        norm = ranks.mean(_norm_of(scanned.packed).float())
        torch._foreach_mul_(list(gradients), torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    # -- the table -----------------------------------------------------------------------------------------------------

    def _group_of(self, params: Sequence[Any]) -> int | None:
        """Which of DeepSpeed's groups these parameters are."""
        return next((index for index, group in enumerate(self._groups) if group is params), None)

    def _norm(self, group: int) -> torch.Tensor:
        """0-dim float64: norm of this rank's gradients of a group, NaN if one is not finite."""
        if self._scanned is None:
            return _torch_norm(self._optimizer, group)
        return _norm_of(self._scanned.packed[self._scanned.groups[group]])


_ZERO = torch.zeros((), dtype=torch.float64)


def _nothing(*_: Any) -> None:
    pass


def _not_ours(optimizer: Any) -> str | None:
    if getattr(optimizer, "use_muon", False) or getattr(optimizer, "_uses_muon", False):
        return "Muon changes gradients between the check and the norm"
    return None


def _is_bad(packed: torch.Tensor) -> torch.Tensor:
    """0-dim bool: whether any record has a non-finite element."""
    return (packed[:, 5] >= 0).any()


def _norm_of(packed: torch.Tensor) -> torch.Tensor:
    """0-dim float64: the norm of all that the records are of, NaN if one is not finite."""
    return torch.where(_is_bad(packed), torch.nan, packed.view(torch.float64)[:, 7].sum().sqrt())


def _torch_is_bad(flats: Sequence[torch.Tensor | None]) -> bool:
    return any(not torch.isfinite(flat).all() for flat in flats if flat is not None)


def _torch_norm(optimizer: Any, group: int) -> torch.Tensor:
    """The same for a step that the guard failed to scan, with DeepSpeed's passes already left out."""
    stage3 = kind_of(optimizer, "DeepSpeedZeroOptimizer_Stage3")
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    gradient = flats[group].grad
    return _ZERO if gradient is None else torch.linalg.vector_norm(gradient.double())
