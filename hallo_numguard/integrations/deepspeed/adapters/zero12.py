"""ZeRO stages 1 and 2, with and without offload of the optimizer to the CPU.

| DeepSpeed's pass that is not made | how it gets the guard's result |
|---|---|
| `has_overflow_partitioned_grads_serial` | returns the flag of the table |
| `get_grad_norm_direct(gradients, params)` | is called with one element |
| offload: `update_offload_overflow_tracker`, `.._for_param_grad` | sets `local_overflow` before the step |
| offload: `set_norm_for_param_grad`, `.._in_gpu`, every backward | notes only that the parameter took part |
| offload: `complete_grad_norm_calculation_for_cpu_offload(params)` | is called with one parameter that has it all |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import (
    FlatBuffers,
    GradientSource,
    Positions,
    check_end,
)
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import (
    OptimizerAdapter,
    Part,
    Release,
    linked_parts,
    takes_bad_norm_for_overflow,
    zero_loss_scaling,
)
from hallo_numguard.integrations.deepspeed.adapters.replaced_norms import ReplacedNorms
from hallo_numguard.integrations.deepspeed.version import unknown_layout
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.ops.api import multi_tensor_stats, tensor_list_stats
from hallo_numguard.ops.tensor_list import TensorList, read


class Zero12Adapter(OptimizerAdapter):
    """`DeepSpeedZeroOptimizer`: every rank holds slices of the reduced gradients."""

    class_names = ("DeepSpeedZeroOptimizer",)
    groups_attribute = "bit16_groups"
    required_attributes = (
        "_update_scale",
        "averaged_gradients",
        "bit16_groups",
        "cpu_offload",
        "dp_process_group",
        "first_offset",
        "loss_scaler",
        "overflow",
        "params_in_partition",
    )
    state_is_sliced = True

    def gradient_source(self) -> GradientSource:
        """Returns flat CPU tensors with offload, else DeepSpeed's lists of tensors."""
        if self.optimizer.cpu_offload:
            return _offloaded_partitions(self.optimizer, self.positions)
        return PartitionLists(self.optimizer, self.positions)

    def loss_scaling(self) -> LossScaling:
        """Returns the state of the optimizer's loss scaler."""
        return zero_loss_scaling(self.optimizer)

    def state_parts(self) -> Iterator[Part]:
        """Yields this rank's slices of the moments and master copies; momenta of Muon whole, as it needs matrices."""
        flats = self.optimizer.single_partition_of_fp32_groups
        yield from linked_parts(self, flats)
        for flat, parameters in zip(flats, self.optimizer.params_in_partition, strict=True):
            momentum = self.optimizer.optimizer.state.get(flat, {}).get("momentum_buffer")
            total = sum(parameter.numel() for parameter in parameters)
            if momentum is None or total != momentum.numel() or total == flat.numel():  # else it is a slice
                continue
            for parameter, part in zip(parameters, momentum.split([p.numel() for p in parameters]), strict=True):
                yield part, Piece(self.positions[parameter], 0)

    def checks_overflow(self) -> bool:
        """Returns whether overflows, or bad norms in their place, skip the step."""
        optimizer = self.optimizer
        if self.checks_elements():
            return True
        is_half = optimizer.dtype != torch.bfloat16
        return takes_bad_norm_for_overflow() and is_half and getattr(optimizer, "compute_grad_norm", True)

    def checks_elements(self) -> bool:
        """Returns whether overflows are looked for, and not a bad norm alone."""
        is_half = self.optimizer.dtype == torch.float16
        return bool(getattr(self.optimizer, "check_grad_overflow", is_half))  # a setting since 0.17.1

    def known_bugs(self, release: Release) -> Iterable[str]:
        """Yields the lost micro-batches of stage 2 (0.17.6 to 0.18.2), and those of all stages."""
        yield from super().known_bugs(release)
        accumulates = getattr(self.optimizer, "gradient_accumulation_steps", 1) > 1
        if accumulates and (0, 17, 6) <= release <= (0, 18, 2):
            yield "drops micro-batches under ZeRO stage 2 with gradient accumulation: upgrade it."

    # -- replace mode ------------------------------------------------------------------------------------------------

    def replace_passes(self, patches: MethodPatches) -> None:
        """Replaces the overflow check and the norm; with offload, also the passes of every backward."""
        optimizer = self.optimizer
        norms = ReplacedNorms(self, optimizer.params_in_partition, lambda: optimizer.single_partition_of_fp32_groups)
        if not optimizer.cpu_offload:
            patches.wrap(optimizer, "has_overflow_partitioned_grads_serial", self._has_overflow)
            patches.wrap(optimizer, "get_grad_norm_direct", norms.get_grad_norm_direct)
            return
        for name in ("update_offload_overflow_tracker", "update_overflow_tracker_for_param_grad"):
            if hasattr(optimizer, name):  # the second up to 0.17.5
                patches.wrap(optimizer, name, _do_nothing)
        for name in ("set_norm_for_param_grad", "set_norm_for_param_grad_in_gpu"):
            patches.wrap(optimizer, name, norms.note_parameter)
        patches.wrap(optimizer, "complete_grad_norm_calculation_for_cpu_offload", norms.complete_grad_norm)

    def begin_step(self, scan: ScannedPieces | None) -> None:
        """Sets the overflow flag of offload, which DeepSpeed would have tracked in the backward pass."""
        super().begin_step(scan)
        if hasattr(self.optimizer, "local_overflow") and self.optimizer.cpu_offload:
            bad = self._offloaded_are_bad() if scan is None else scan.table.any_nonfinite()
            self.optimizer.local_overflow = bool(bad)

    def _offloaded_are_bad(self) -> bool:
        flats = [flat.grad for flat in self.optimizer.single_partition_of_fp32_groups]
        return any(not torch.isfinite(flat).all() for flat in flats if flat is not None)

    def _has_overflow(self, original: Callable[..., Any]) -> Any:
        return original() if self.scan is None else self.scan.table.any_nonfinite().reshape(1)


class PartitionLists:
    """Gradients without offload: scattered tensors, of the same sizes but at new addresses every step."""

    is_sliced = True
    has_unknown = False

    def __init__(self, optimizer: Any, positions: Positions) -> None:
        self._optimizer = optimizer
        self._positions = positions
        self._lengths: list[int] = []  # of each group's list
        self._sizes = b""  # of the tensors without the padding
        self._is_real: list[bool] = []
        self._pieces: list[Piece] = []
        self._groups: list[slice] = []

    def scan(self) -> ScannedPieces:
        """Reads the lists once, without the padding."""
        groups = range(len(self._optimizer.bit16_groups))
        lists = [self._optimizer.averaged_gradients.get(group) or () for group in groups]
        lengths = list(map(len, lists))
        tensors = self._listed(lists) if lengths == self._lengths else None
        if tensors is None or tensors.sizes != self._sizes:
            self._learn(lists)
            tensors = self._listed(lists)
            self._lengths, self._sizes = lengths, b"" if tensors is None else tensors.sizes
        table = multi_tensor_stats(()) if tensors is None else tensor_list_stats(tensors)
        return ScannedPieces(table, self._pieces, self._groups)

    def _listed(self, lists: Sequence[Sequence[torch.Tensor]]) -> TensorList | None:
        """The tensors without the padding; None if there are none."""
        real = list(itertools.compress(itertools.chain.from_iterable(lists), self._is_real))
        return read(real) if real else None

    def _learn(self, lists: Sequence[Sequence[torch.Tensor]]) -> None:
        """Finds the pieces, and which tensors are padding: what changes with the sizes alone."""
        self._is_real, self._pieces, self._groups = [], [], []
        for group, gradients in enumerate(lists):
            begin = len(self._pieces)
            # Older releases append the padding without a mark: it follows the last parameter.
            room = len(self._optimizer.params_in_partition[group])
            for tensor in gradients:
                held = len(self._pieces) - begin
                is_real = not getattr(tensor, "_zero_padding", False) and held < room
                self._is_real.append(is_real)
                if is_real:
                    self._pieces.append(self._piece(group, held, tensor.numel()))
            self._groups.append(slice(begin, len(self._pieces)))

    def drop(self) -> None:
        """Does nothing: the optimizer has dropped its lists."""

    def _piece(self, group: int, index: int, size: int) -> Piece:
        parameter = self._optimizer.params_in_partition[group][index]
        # Only a partition's first parameter can begin in its middle. A float before DeepSpeed 0.19.7.
        start = int(self._optimizer.first_offset[group]) if index == 0 else 0
        if start + size > parameter.numel():
            raise unknown_layout(
                self._optimizer,
                "averaged_gradients",
                f"{size} elements from {start} on for a parameter of {parameter.numel()}",
            )
        return Piece(self._positions[parameter], start)


def _offloaded_partitions(optimizer: Any, positions: Positions) -> FlatBuffers:
    """Gradients with offload: one flat float32 tensor per group on the CPU."""
    buffers = []
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        segments = []
        for parameter in optimizer.params_in_partition[group]:
            place = optimizer.grad_position[optimizer.get_param_id(parameter)]
            _, start, begin, size = (int(value) for value in place)
            segments.append((begin, begin + size, Piece(positions[parameter], start)))
        segments.sort()
        check_end(optimizer, "single_partition_of_fp32_groups", segments, flat.numel())
        buffers.append((lambda flat=flat: flat.grad, segments))
    return FlatBuffers(buffers, is_sliced=True, wait=lambda: _wait_for_copies(optimizer))


def _wait_for_copies(optimizer: Any) -> None:
    """Waits for gradients that DeepSpeed copies from the GPU during the backward pass."""
    if hasattr(optimizer, "_wait_for_offload_copies"):
        optimizer._wait_for_offload_copies()
    elif torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _do_nothing(*_: Any) -> None:
    pass
