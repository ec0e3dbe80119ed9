"""ZeRO stage 3, with and without offload of the optimizer to the CPU or to NVMe.

| DeepSpeed's pass that is not made | how it gets the guard's result |
|---|---|
| `has_overflow`: two passes over `grad_partitions_flat_buffer` | finds one element there |
| `get_grad_norm_direct(gradients, params)` | is called with one element |
| offload: `_constant_buffered_norm2(grad)`, every backward | notes only that the parameter took part |
| offload: `complete_grad_norm_calculation_for_cpu_offload(params)` | is called with one parameter that has it all |
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hallo_numguard.guard import readable
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import FlatBuffers, GradientSource, Positions
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import (
    OptimizerAdapter,
    Part,
    attribute_set,
    origins,
    takes_bad_norm_for_overflow,
    zero_loss_scaling,
)
from hallo_numguard.integrations.deepspeed.adapters.replaced_norms import ReplacedNorms
from hallo_numguard.integrations.deepspeed.partition import slice_of
from hallo_numguard.integrations.deepspeed.swapping import SwappedState
from hallo_numguard.integrations.deepspeed.version import unknown_layout
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.ops.table import StatsTable


class Zero3Adapter(OptimizerAdapter):
    """`DeepSpeedZeroOptimizer_Stage3`: every rank holds a slice of each parameter, its gradient and its state."""

    class_names = ("DeepSpeedZeroOptimizer_Stage3",)
    groups_attribute = "fp16_groups"
    required_attributes = (
        "_update_scale",
        "dp_process_group",
        "fp16_groups",
        "grad_partitions_flat_buffer",
        "loss_scaler",
        "overflow",
    )
    state_is_sliced = True

    def __init__(self, optimizer: Any, positions: Positions) -> None:
        super().__init__(optimizer, positions)
        self._swapped = SwappedState(optimizer)

    @classmethod
    def check_supported(cls, optimizer: Any) -> None:
        """Raises UnsupportedDeepSpeed also if its state is on NVMe, and cannot be read with this release."""
        super().check_supported(optimizer)
        SwappedState(optimizer).check_supported()

    def gradient_source(self) -> GradientSource:
        """Returns the one flat tensor of all groups: this rank's slice of each parameter's gradient."""
        optimizer = self.optimizer
        segments = []
        begin = 0
        for parameter in itertools.chain.from_iterable(optimizer.fp16_groups):
            mine = slice_of(parameter)
            segments.append((begin, begin + mine.real, Piece(self.positions[parameter], mine.start)))
            begin += mine.size
        if begin != optimizer.grad_partitions_flat_buffer.numel():
            raise unknown_layout(
                optimizer,
                "grad_partitions_flat_buffer",
                f"{optimizer.grad_partitions_flat_buffer.numel()} elements where the parameters account for {begin}",
            )
        return FlatBuffers(
            [(lambda: optimizer.grad_partitions_flat_buffer, segments)],
            is_sliced=True,
            groups=[len(group) for group in optimizer.fp16_groups],
            copies=lambda: [flat.grad for flat in optimizer.fp32_partitioned_groups_flat if flat is not None],
            drop_others=self._swapped.drop_gradients,
        )

    def loss_scaling(self) -> LossScaling:
        """Returns the state of the optimizer's loss scaler."""
        return zero_loss_scaling(self.optimizer)

    def scan_state(self) -> ScannedPieces:
        """Reads the state once; where it is on NVMe a sub-group at a time, as all of it may not fit into memory."""
        if not self._swapped.is_used:
            return super().scan_state()
        tables, pieces = [], []
        for number in self._numbers():
            with self._swapped.in_memory(number):
                parts = list(self._parts_of(number))
                found = readable.scan([tensor for tensor, _ in parts])
                pieces += origins(found.table, [parts[owner] for owner in found.owners])
            tables.append(found.table)
        return ScannedPieces(StatsTable.concatenate(tables), pieces)

    def state_parts(self) -> Iterator[Part]:
        """Yields this rank's slices of the moments and master copies; those of NVMe are gone with the next one."""
        for number in self._numbers():
            with self._swapped.in_memory(number):
                yield from self._parts_of(number)

    def state_parts_of(self, position: int | None) -> list[Part]:
        """Returns copies of one parameter's state; of what is on NVMe only its sub-group is read."""
        if position is None:
            return []
        for number in self._numbers():
            if not any(self.positions.get(parameter) == position for parameter in self.optimizer.fp16_groups[number]):
                continue
            with self._swapped.in_memory(number):
                return [(part.clone(), piece) for part, piece in self._parts_of(number) if piece.parameter == position]
        return []

    def changed_state_parts(self) -> Iterator[Part]:
        """Yields what `state_parts` does, and writes it to NVMe where it came from there."""
        for number in self._numbers():
            with self._swapped.in_memory(number, is_written=True):
                yield from self._parts_of(number)

    def _numbers(self) -> Iterator[int]:
        """The sub-groups that are trained."""
        flats = self.optimizer.fp32_partitioned_groups_flat
        return (number for number, flat in enumerate(flats) if flat is not None)

    def _parts_of(self, number: int) -> Iterator[Part]:
        """The state of a sub-group that is in memory."""
        optimizer = self.optimizer
        flat = optimizer.fp32_partitioned_groups_flat[number]
        tensors = [flat, *self.flat_moments(optimizer.optimizer, flat)]
        if hasattr(optimizer, "backup_optimizer"):  # with a ratio of offload, it steps what is not offloaded
            tensors += self.flat_moments(optimizer.backup_optimizer, flat)
        begin = 0
        for parameter in optimizer.fp16_groups[number]:
            mine = slice_of(parameter)
            for tensor in tensors:
                if not _share_memory(tensor, parameter.ds_tensor):
                    yield (
                        tensor.view(-1)[begin : begin + mine.real],
                        Piece(self.positions[parameter], mine.start),
                    )
            begin += mine.size

    def checks_overflow(self) -> bool:
        """Returns whether overflows, or bad norms in their place, skip the step."""
        return self.optimizer.dtype == torch.float16 or takes_bad_norm_for_overflow()

    def checks_elements(self) -> bool:
        """Returns whether overflows are looked for, and not a bad norm alone."""
        return bool(self.optimizer.dtype == torch.float16)

    # -- replace mode ------------------------------------------------------------------------------------------------

    def replace_passes(self, patches: MethodPatches) -> None:
        """Replaces the overflow check and the norm; with offload, also the norm in every backward."""
        optimizer = self.optimizer
        norms = ReplacedNorms(self, optimizer.fp16_groups, lambda: optimizer.fp32_partitioned_groups_flat)
        patches.wrap(optimizer, "has_overflow", self._has_overflow)
        if not optimizer.offload_optimizer:
            patches.wrap(optimizer, "get_grad_norm_direct", norms.get_grad_norm_direct)
            return
        patches.wrap(optimizer, "_constant_buffered_norm2", _no_norm)
        patches.wrap(optimizer, "complete_grad_norm_calculation_for_cpu_offload", norms.complete_grad_norm)

    def _has_overflow(self, original: Callable[..., Any], partition_gradients: bool = True) -> Any:
        if self.scan is None or not partition_gradients:
            return original(partition_gradients)
        stand_in = torch.where(self.scan.table.any_nonfinite(), torch.nan, 0.0).reshape(1)
        _hand_over(stand_in, getattr(self.optimizer, "reduce_and_partition_stream", None))
        with attribute_set(self.optimizer, "grad_partitions_flat_buffer", stand_in):
            return original(partition_gradients)


def _hand_over(value: torch.Tensor, stream: Any) -> None:
    """Lets DeepSpeed's stream wait for what was made on this one: it reads the value without waiting by itself."""
    accelerator = sys.modules["deepspeed.accelerator"].get_accelerator()
    if stream is None or accelerator.resolves_data_dependency():
        return
    stream.wait_stream(accelerator.current_stream())
    if value.device.type != "cpu":
        value.record_stream(stream)


def _no_norm(_: Callable[..., Any], gradient: torch.Tensor, *__: Any) -> torch.Tensor:
    return torch.zeros((), device=gradient.device)


def _share_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a master copy is the weight itself: older releases of stage 3 in float32 make no copy."""
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
