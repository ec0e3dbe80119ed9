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

MAX_LOSSES = 4096  # of a step

_WAS_CALLED, _GIVEN, _RETURNED = 0, slice(1, 5), slice(5, 9)
_COLUMNS = 9


def share_losses(
    ranks: Ranks, stage: Stage, pending: PendingStep, device: torch.device
) -> tuple[LostBetween | None, int]:
    """Gives the other stages the losses of the last one, and searches for what was lost between two stages.

    The stages of a copy add up a table, and all ranks send a text: both are of fixed sizes.

    Args:
        ranks: All ranks of the pipeline and of its copies.
        stage: This rank's stage.
        pending: The step under way. If all others are finite, it keeps the losses of calls that are kept.
        device: Device on which ranks reduce.

    Returns:
        The first loss between two stages on the lowest rank that knows one, the same on all ranks, or None; and how
        many losses were dropped.
    """
    if ranks.alone_because:
        return None, 0
    calls = torch.zeros((stage.stages, MAX_CALLS, _COLUMNS), dtype=torch.float64)
    with contain_failures("comparison of the stages", "what this stage has received and returned is not compared"):
        calls[stage.number] = _seen_here(stage, pending)
    losses = torch.zeros((2, MAX_LOSSES), dtype=torch.float64)
    if stage.is_last:
        for at, loss in enumerate(pending.losses[-MAX_LOSSES:]):
            losses[0, at], losses[1, at] = 1.0, float(loss)
    seen = ranks.sum_among(stage.group, torch.cat([calls.flatten(), losses.flatten()]).to(device)).cpu()
    calls, losses = seen[: calls.numel()].view_as(calls), seen[calls.numel() :].view_as(losses)
    if not stage.is_last:
        pending.losses[:] = losses[1, losses[0] > 0].float().unbind()
    others = pending.losses[:-MAX_CALLS]  # of calls that are not kept
    is_dropped = ranks.highest(int(any(not loss.isfinite() for loss in others)), device) == 0
    if is_dropped:
        del pending.losses[:-MAX_CALLS]
    lost = _lost_between(calls)
    text = ranks.first_text(None if lost is None else json.dumps(encode(lost)), device)
    return None if text is None else decode(LostBetween, json.loads(text)), len(others) if is_dropped else 0


def _seen_here(stage: Stage, pending: PendingStep) -> torch.Tensor:
    """A row a micro-batch. Synchronises."""
    rows = torch.zeros((MAX_CALLS, _COLUMNS), dtype=torch.float64)
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
