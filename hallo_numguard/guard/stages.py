"""Stages of a pipeline: each rank calls other layers, the first is given the batch, and the last makes the loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.nested import as_plain, is_readable

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Stage:
    """A rank's place in a pipeline.

    Attributes:
        number: Number of its stage, from 0.
        stages: Number of stages.
        copy: Number of the copy of the pipeline that it belongs to.
        copies: Number of copies, among which gradients are averaged.
        group: Process group of the stages of this copy.
        argument: Name of the argument that a stage's call has from the stage before.
    """

    number: int
    stages: int
    copy: int
    copies: int
    group: dist.ProcessGroup
    argument: str

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the loss."""
        return self.number == self.stages - 1

    def is_received(self, name: str) -> bool:
        """Returns whether what a call was given under that name comes from the stage before."""
        return self.number > 0 and name.startswith(self.argument)

    def received(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Returns what came from the stage before of what a call was given, by name."""
        return [tensor for name, tensor in tensors if self.is_received(name)]


@dataclass(frozen=True)
class Figures:
    """What a number of tensors hold together.

    Attributes:
        numel: Number of elements.
        nonfinite: Number of NaN and +Inf: -Inf alone is how masks are written.
        absmax: Largest finite absolute value.
        sumsq: Sum of squares of the finite elements.
    """

    numel: float
    nonfinite: float
    absmax: float
    sumsq: float

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Figures:
        """Reads tensors once, without those that hold integers. Synchronises."""
        plain = [as_plain(tensor) for tensor in tensors if is_readable(tensor)]
        table = multi_tensor_stats(plain)
        absmax = float(table.absmax.max()) if plain else 0.0
        nonfinite, sumsq = float((table.nan + table.pos_inf).sum()), float(table.sumsq.sum())
        return cls(float(sum(tensor.numel() for tensor in plain)), nonfinite, absmax, sumsq)


def are_alike(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns whether figures can be of the same elements, of which sums are rounded otherwise in another layout.

    Args:
        left: The fields of `Figures`, in their order, in the last dimension.
        right: The others.
    """
    is_same = left == right
    is_close = torch.isclose(left[..., -1], right[..., -1], rtol=_ROUNDING, atol=0.0)
    return is_same[..., :-1].all(dim=-1) & (is_close | is_same[..., -1])


@dataclass(frozen=True)
class LostBetween:
    """A micro-batch that was not, where a stage was given it, what the stage before had returned.

    Attributes:
        stage: Number of the stage that was given it.
        micro_batch: Position of the micro-batch in the step.
        returned: What the stage before had returned.
        given: What the stage was given.
    """

    stage: int
    micro_batch: int
    returned: Figures
    given: Figures
