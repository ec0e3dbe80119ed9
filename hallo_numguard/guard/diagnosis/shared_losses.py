"""What the stages of a pipeline tell each other of a bad step: losses, and what was lost between two stages."""

from __future__ import annotations

import torch

from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.stages import Figures, LostBetween, Stage, are_alike
from hallo_numguard.guard.step.pending import MAX_CALLS, PendingStep

_HAS_LOSS, _LOSS, _WAS_CALLED = range(3)
_GIVEN, _RETURNED = slice(3, 7), slice(7, 11)
_COLUMNS = 11


def share_losses(ranks: Ranks, stage: Stage, pending: PendingStep, device: torch.device) -> LostBetween | None:
    """Gives the other stages the losses of the last one, and searches for what was lost between two stages.

    One reduction of a fixed size, in which all ranks take part.

    Args:
        ranks: All ranks of the pipeline and of its copies.
        stage: This rank's stage.
        pending: The step under way. It keeps the losses that belong to the calls that are kept.
        device: Device on which ranks reduce.

    Returns:
        The first loss between two stages, the same on all ranks; None if there was none.
    """
    del pending.losses[:-MAX_CALLS]
    if ranks.alone_because:
        return None
    seen = torch.zeros((stage.copies, stage.stages, MAX_CALLS, _COLUMNS), dtype=torch.float64)
    seen[stage.copy, stage.number] = _seen_here(stage, pending)
    seen = ranks.sum(seen.to(device)).cpu()
    if not stage.is_last:
        of_last = seen[stage.copy, -1]
        pending.losses[:] = of_last[of_last[:, _HAS_LOSS] > 0, _LOSS].float().unbind()
    return _lost_between(seen)


def _seen_here(stage: Stage, pending: PendingStep) -> torch.Tensor:
    """A row a micro-batch. Synchronises."""
    rows = torch.zeros((MAX_CALLS, _COLUMNS), dtype=torch.float64)
    if stage.is_last:
        for row, loss in zip(rows, pending.losses, strict=False):
            row[_HAS_LOSS], row[_LOSS] = 1.0, float(loss)
    for row, call in zip(rows, pending.calls, strict=False):
        if call.outputs is not None:
            row[_WAS_CALLED] = 1.0
            row[_GIVEN] = torch.tensor(Figures.of(stage.received(call.contents.tensors)), dtype=torch.float64)
            row[_RETURNED] = torch.tensor(Figures.of(call.outputs), dtype=torch.float64)
    return rows


def _lost_between(seen: torch.Tensor) -> LostBetween | None:
    """The first difference between what a stage has returned and what the next one was given, of all copies."""
    before, after = seen[:, :-1], seen[:, 1:]
    returned, given = before[..., _RETURNED], after[..., _GIVEN]
    are_seen = (before[..., _WAS_CALLED] > 0) & (after[..., _WAS_CALLED] > 0)
    differ = (are_seen & ~are_alike(returned, given)).permute(2, 1, 0)  # micro-batch, stage, copy
    if not differ.any():
        return None
    micro_batch, stage, copy = map(int, differ.nonzero()[0])
    places = copy, stage, micro_batch
    return LostBetween(stage + 1, micro_batch, Figures(*returned[places].tolist()), Figures(*given[places].tolist()))
