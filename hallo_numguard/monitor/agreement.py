"""Ranks that agree: every reduction is of a fixed size, so all ranks take the same path whatever each has seen."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hallo_numguard.monitor.layout import NONE, Sums


class Ranks:
    """The ranks among which gradients are reduced. With one process, everything here is the identity.

    Args:
        group: Process group; None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self._group = group
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank()

    def highest(self, value: int, device: torch.device) -> int:
        """Returns the highest of the values that the ranks give. Synchronises."""
        return int(self._reduce(torch.tensor([value], device=device), dist.ReduceOp.MAX).item())

    def lowest(self, value: int, device: torch.device) -> int:
        """Returns the lowest of the values that the ranks give. Synchronises."""
        return int(self._reduce(torch.tensor([value], device=device), dist.ReduceOp.MIN).item())

    def sliced(self, local: Sums) -> Sums:
        """Adds up tensors of which every rank holds another slice."""
        return Sums(
            self._reduce(local.counts, dist.ReduceOp.SUM),
            self._reduce(local.first, dist.ReduceOp.MIN),
            self._reduce(local.absmax, dist.ReduceOp.MAX),
        )

    def replicated(self, local: Sums) -> tuple[Sums, torch.Tensor]:
        """Compares tensors of which every rank holds a whole copy.

        Returns:
            For every tensor what the lowest rank has seen on which it is not finite, and int64 [n] that rank (`NONE` if
            it is finite everywhere).
        """
        bad = local.first != NONE
        rank = self._reduce(torch.where(bad, self.rank, NONE), dist.ReduceOp.MIN)
        mine = rank == self.rank
        words = torch.cat([local.counts, local.first[:, None], local.absmax.view(torch.int64)[:, None]], dim=1)
        # Only one rank contributes, so the sum of the words is that rank's, bit for bit.
        words = self._reduce(torch.where(mine[:, None], words, 0), dist.ReduceOp.SUM)
        first = torch.where(rank == NONE, NONE, words[:, 3])
        return Sums(words[:, :3], first, words[:, 4].contiguous().view(torch.float64)), rank

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        tensor = tensor.contiguous()
        if self.size > 1:
            dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor
