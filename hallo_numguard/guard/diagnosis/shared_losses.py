"""What the stages of a pipeline tell each other of a bad step: losses, and where something was lost between two."""

from __future__ import annotations

import torch

from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.stages import LostBetween, Stage, hold_nan_or_inf
from hallo_numguard.guard.step.pending import MAX_CALLS, PendingStep

_HAS_LOSS, _LOSS, _WAS_CALLED, _WAS_GIVEN_BAD, _HAS_RETURNED_BAD = range(5)
_COLUMNS = 5


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
            row[_WAS_GIVEN_BAD] = float(stage.was_given_bad(call.contents.tensors))
            row[_HAS_RETURNED_BAD] = float(hold_nan_or_inf(call.outputs))
    return rows


def _lost_between(seen: torch.Tensor) -> LostBetween | None:
    flags = seen > 0
    both_called = flags[:, :-1, :, _WAS_CALLED] & flags[:, 1:, :, _WAS_CALLED]
    is_lost = both_called & ~flags[:, :-1, :, _HAS_RETURNED_BAD] & flags[:, 1:, :, _WAS_GIVEN_BAD]
    found = is_lost.any(dim=0).T.nonzero()  # of the first micro-batch, and of its stages the first
    return LostBetween(int(found[0, 1]) + 1, int(found[0, 0])) if len(found) else None
