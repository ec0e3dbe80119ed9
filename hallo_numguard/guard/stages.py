"""Stages of a pipeline: each rank calls other layers, the first is given the batch, and the last makes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.nested import as_plain, is_readable


@dataclass(frozen=True)
class Stage:
    """A rank's place in a pipeline.

    Attributes:
        number: Number of its stage, from 0.
        stages: Number of stages.
        copy: Number of the copy of the pipeline that it belongs to.
        copies: Number of copies, among which gradients are averaged.
        received: Name of the argument that a stage's call has from the stage before.
    """

    number: int
    stages: int
    copy: int
    copies: int
    received: str

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the loss."""
        return self.number == self.stages - 1

    def is_received(self, name: str) -> bool:
        """Returns whether what a call was given under that name comes from the stage before."""
        return self.number > 0 and name.startswith(self.received)

    def was_given_bad(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> bool:
        """Returns whether what came from the stage before holds NaN or +Inf. Synchronises.

        Args:
            tensors: What a call was given, by name.
        """
        return hold_nan_or_inf([tensor for name, tensor in tensors if self.is_received(name)])


@dataclass(frozen=True)
class LostBetween:
    """A micro-batch that was finite where a stage returned it, and not where the next one was given it.

    Attributes:
        stage: Number of the stage that was given it.
        micro_batch: Position of the micro-batch in the step.
    """

    stage: int
    micro_batch: int


def hold_nan_or_inf(tensors: Sequence[torch.Tensor]) -> bool:
    """Returns whether one of them holds NaN or +Inf: -Inf alone is how masks are written. Synchronises."""
    table = multi_tensor_stats([as_plain(tensor) for tensor in tensors if is_readable(tensor)])
    return bool((table.nan + table.pos_inf).sum() > 0)
