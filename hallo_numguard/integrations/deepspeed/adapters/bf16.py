"""BF16_Optimizer: stage 1 in bfloat16 with gradients that are added up in float32.

None of its passes can be replaced on an instance: in replace mode, too, it is observed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import FlatBuffers, GradientSource, check_end
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import (
    OptimizerAdapter,
    Part,
    linked_parts,
    takes_bad_norm_for_overflow,
)
from hallo_numguard.integrations.patches import MethodPatches


class Bf16Adapter(OptimizerAdapter):
    """`BF16_Optimizer`: every rank holds all of the gradients, and a slice of the state."""

    class_names = ("BF16_Optimizer",)
    groups_attribute = "bf16_groups"
    required_attributes = ("bf16_groups", "dp_process_group", "fp32_groups_gradients_flat")
    state_is_sliced = True

    def gradient_source(self) -> GradientSource:
        """Returns one flat tensor per group, the whole of it on every rank."""
        optimizer = self.optimizer
        buffers = []
        for group, parameters in enumerate(optimizer.bf16_groups):
            ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
            segments = [
                (end - parameter.numel(), end, Piece(self.positions[parameter], 0))
                for parameter, end in zip(parameters, ends, strict=True)
            ]
            numel = optimizer.fp32_groups_gradients_flat[group].numel()
            check_end(optimizer, "fp32_groups_gradients_flat", segments, numel)
            buffers.append((lambda group=group: optimizer.fp32_groups_gradients_flat[group], segments))
        return FlatBuffers(buffers, is_sliced=False)

    def loss_scaling(self) -> LossScaling:
        """Returns that nothing is scaled: bfloat16 has the range of float32."""
        return UNSCALED

    def state_parts(self) -> Iterator[Part]:
        """Yields this rank's slices of the moments and master copies."""
        return linked_parts(self, self.optimizer.fp32_groups_flat_partition)

    def replace_passes(self, patches: MethodPatches) -> None:
        """Replaces nothing: the norm is a function of DeepSpeed's module, which cannot be replaced on an instance."""

    def checks_overflow(self) -> bool:
        """Returns whether a step with a bad norm is skipped; before 0.19.8 it fails an assertion without a message."""
        return takes_bad_norm_for_overflow()

    def checks_elements(self) -> bool:
        """Returns False: only the norm is looked at."""
        return False
