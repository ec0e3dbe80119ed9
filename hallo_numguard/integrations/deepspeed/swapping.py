"""The optimizer's state on NVMe, under ZeRO stage 3: read a sub-group at a time, by DeepSpeed's own functions.

A tensor that is swapped out is empty, or points at a buffer that is used for others by now. DeepSpeed reads a
sub-group's tensors and gradients into buffers of its own, of which it has as many as one sub-group needs: whoever keeps
one makes the next step fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hallo_numguard.integrations.deepspeed.version import require

_OF_OPTIMIZER = (
    "_optimizer_states_and_gradient_swap_in",
    "_release_swap_buffers",
    "_swappable_optimizer_subgroup",
    "_writeback_swap_state",
    "optimizer_swapper",
)
_OF_SWAPPER = ("flush_gradients", "swap_out_gradients", "swap_params_info")


class SwappedState:
    """What DeepSpeed's optimizer swapper keeps.

    Args:
        optimizer: A `DeepSpeedZeroOptimizer_Stage3`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def is_used(self) -> bool:
        """Whether the optimizer is offloaded to NVMe; groups that are too small for it are in memory all the same."""
        return bool(getattr(self._optimizer, "swap_optimizer", False))

    def check_supported(self) -> None:
        """Raises UnsupportedDeepSpeed if a sub-group cannot be read and given back with this release."""
        if self.is_used:
            require(self._optimizer, *_OF_OPTIMIZER)
            require(self._optimizer.optimizer_swapper, *_OF_SWAPPER)

    @contextlib.contextmanager
    def in_memory(self, group: int, is_written: bool = False) -> Iterator[None]:
        """Reads a sub-group that is swapped out, and gives its buffers back at the end.

        Args:
            group: Number of the sub-group.
            is_written: Whether the caller changes the tensors: they are then written before.
        """
        optimizer = self._optimizer
        if not self._is_out(group):
            yield
            return
        is_read = False
        try:
            optimizer._optimizer_states_and_gradient_swap_in(group)
            is_read = True
            yield
        finally:
            if is_read and is_written:
                optimizer._writeback_swap_state(group, write_opt_state=True, write_gradients=False)
            else:
                optimizer._release_swap_buffers(group)

    def drop_gradients(self) -> None:
        """Sets the gradients to zero that wait on NVMe, or beside it, for a step that was skipped.

        A parameter that takes no part in the next step would be updated with them.
        """
        if not self.is_used:
            return
        swapper = self._optimizer.optimizer_swapper
        swapper.flush_gradients()  # a file must not be written twice at once
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            kept = swapper.swap_params_info.get(getattr(flat, "ds_id", None))
            if kept is None:
                continue
            for gradient in kept.unswapped_gradients.values():
                gradient.zero_()
            for written in list(kept.swapped_gradients.values()):
                zeros = torch.zeros(written.length, dtype=swapper.dtype)
                swapper.swap_out_gradients(flat, gradient_offsets=[written.offset], gradient_tensors=[zeros])
        swapper.flush_gradients()

    def _is_out(self, group: int) -> bool:
        """Whether it has to be read: the swapper knows, a tensor may still point at a buffer that is others' by now."""
        optimizer = self._optimizer
        if not self.is_used or not optimizer._swappable_optimizer_subgroup(group):
            return False
        flat, swapper = optimizer.fp32_partitioned_groups_flat[group], optimizer.optimizer_swapper
        if hasattr(swapper, "swap_ops"):  # "offload_optimizer": {"pipeline_read" or "pipeline_write": true}
            read = swapper.swap_ops["sync_swap_in"]
            return read is None or not read.is_parameter(flat)
        return not swapper.swap_params_info[flat.ds_id].swap_buffers


@contextlib.contextmanager
def in_memory(parameter: Any) -> Iterator[None]:
    """Reads this rank's part of a parameter that is on NVMe, to be changed, and writes it there at the end."""
    status = getattr(parameter.ds_tensor, "status", None)
    if getattr(status, "name", "") != "NOT_AVAILABLE":
        yield
        return
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield
    finally:
        parameter.nvme_swapper.swap_out_and_release([parameter])
