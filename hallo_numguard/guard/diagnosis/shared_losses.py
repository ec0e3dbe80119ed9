"""What the stages of a pipeline tell each other of a bad step: losses, and what was lost between two stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple

import torch

from hallo_numguard.core.documents import decode, encode
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import contain_failures
from hallo_numguard.guard.stages import Figures, LostBetween, Stage, are_alike
from hallo_numguard.guard.step.pending import MAX_CALLS, PendingStep

_HAS_LOSS, _LOSS, _WAS_CALLED = range(3)
_GIVEN, _RETURNED = slice(3, 7), slice(7, 11)
_COLUMNS = 11


def share_losses(ranks: Ranks, stage: Stage, pending: PendingStep, device: torch.device) -> LostBetween | None:
    """Gives the other stages the losses of the last one, and searches for what was lost between two stages.

    The stages of a copy add up a table, and all ranks send a text: both are of fixed sizes.

    Args:
        ranks: All ranks of the pipeline and of its copies.
        stage: This rank's stage.
        pending: The step under way. It keeps the losses that belong to the calls that are kept.
        device: Device on which ranks reduce.

    Returns:
        The first loss between two stages on the lowest rank that knows one, the same on all ranks; None if none does.
    """
    del pending.losses[:-MAX_CALLS]
    if ranks.alone_because:
        return None
    seen = torch.zeros((stage.stages, MAX_CALLS, _COLUMNS), dtype=torch.float64)
    with contain_failures("comparison of the stages", "what this stage has received and returned is not compared"):
        seen[stage.number] = _seen_here(stage, pending)
    seen = ranks.sum_among(stage.group, seen.to(device)).cpu()
    if not stage.is_last:
        pending.losses[:] = seen[-1, seen[-1, :, _HAS_LOSS] > 0, _LOSS].float().unbind()
    lost = _lost_between(seen)
    text = ranks.first_text(None if lost is None else json.dumps(encode(lost)), device)
    return None if text is None else decode(LostBetween, json.loads(text))


def _seen_here(stage: Stage, pending: PendingStep) -> torch.Tensor:
    """A row a micro-batch. Synchronises."""
    rows = torch.zeros((MAX_CALLS, _COLUMNS), dtype=torch.float64)
    if stage.is_last:
        for row, loss in zip(rows, pending.losses, strict=False):
            row[_HAS_LOSS], row[_LOSS] = 1.0, float(loss)
    for row, call in zip(rows, pending.calls, strict=False):
        if call.outputs is not None:
            row[_WAS_CALLED] = 1.0
            row[_GIVEN] = _row(stage.received(call.contents.tensors))
            row[_RETURNED] = _row(call.outputs)
    return rows


def _row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor(astuple(Figures.of(tensors)), dtype=torch.float64)


def _lost_between(seen: torch.Tensor) -> LostBetween | None:
    """The first difference between what a stage has returned and what the next one was given."""
    before, after = seen[:-1], seen[1:]
    returned, given = before[..., _RETURNED], after[..., _GIVEN]
    are_seen = (before[..., _WAS_CALLED] > 0) & (after[..., _WAS_CALLED] > 0)
    differ = (are_seen & ~are_alike(returned, given)).T.nonzero()
    if not len(differ):
        return None
    micro_batch, stage = map(int, differ[0])
    both = Figures(*returned[stage, micro_batch].tolist()), Figures(*given[stage, micro_batch].tolist())
    return LostBetween(stage + 1, micro_batch, *both)
