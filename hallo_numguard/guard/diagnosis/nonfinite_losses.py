"""Looks at a step that was applied with a loss that is not finite: losses, labels, outputs, inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from hallo_numguard.core.records import Offender
from hallo_numguard.guard.diagnosis.loss_messages import BadLoss
from hallo_numguard.guard.named_tensors import NamedTensor, scan_tensors
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.pending import PendingStep
from hallo_numguard.ops.formats import dtype_name

_LABELS = re.compile(r"(^|[^a-z])(labels?|targets?|y)($|[^a-z])", re.IGNORECASE)
_IGNORED = -100  # what torch's losses ignore by default
_ALSO_IGNORED = (-1, 255)  # what labels often hold where there is none


def loss_offender(loss: float, dtype: str, rank: int) -> Offender:
    """Returns the loss as an offender."""
    return Offender(
        kind="loss",
        name="loss",
        module="",
        rank=rank,
        index=(),
        nan=int(math.isnan(loss)),
        pos_inf=int(loss == math.inf),
        neg_inf=int(loss == -math.inf),
        absmax=0.0,
        numel=1,
        shape=(),
        dtype=dtype,
    )


def look_at(pending: PendingStep, batch: Batch, rank: int) -> tuple[BadLoss, Offender]:
    """Returns what the tensors of a step show, and its first bad loss. Synchronises: for a bad step only."""
    values = [float(loss) for loss in pending.losses]
    bad = [place for place, value in enumerate(values) if not math.isfinite(value)]
    loss = values[bad[0]] if bad else math.nan
    finite = [math.isfinite(value) for value in values]
    found = batch.first_nonfinite(rank, finite) if batch.seen else None
    output = _bad_output(batch, finite, rank)
    return BadLoss(
        micro_batches=tuple(bad),
        count=len(values),
        value=in_words(loss),
        output=output,
        outputs_known=bool(batch.calls) and all(call.outputs is not None for call in batch.calls),
        input=None if found is None else found[0],
        inputs_known=batch.seen,
        labels=tuple(_ignored_labels(batch, finite)),
        calls_before=batch.calls_before,
        is_scaled=math.isinf(loss) and pending.scaling.scale > 1.0,
    ), loss_offender(loss, dtype_name(pending.losses[bad[0] if bad else 0].dtype), rank)


def in_words(loss: float) -> str:
    """Returns "NaN", "Inf" or "-Inf"."""
    return "NaN" if math.isnan(loss) else "Inf" if loss > 0 else "-Inf"


def _suspects(batch: Batch, finite: list[bool]) -> Iterator[int]:
    """Positions of the calls whose loss was not finite; of all calls where they have no losses of their own."""
    before = batch.losses_before(len(finite))
    for position in range(len(batch.calls)):
        if before is None or not finite[position + before]:
            yield position


def _bad_output(batch: Batch, finite: list[bool], rank: int) -> Offender | None:
    """The first output, of more than one number, that holds NaN or +Inf. -Inf alone is how logits are masked."""
    for position in _suspects(batch, finite):
        outputs = [tensor for tensor in batch.calls[position].outputs or () if tensor.numel() > 1]
        named = [NamedTensor("activation", "output", tensor) for tensor in outputs]
        stats = scan_tensors(named)
        for at in stats.bad_positions():
            if not stats.only_negative_infinity(at):
                return named[at].offender(stats, at, rank)
    return None


def _ignored_labels(batch: Batch, finite: list[bool]) -> Iterator[tuple[str, int, int]]:
    """Labels of the suspected calls that hold nothing but one number that stands for no label."""
    for position in _suspects(batch, finite):
        for name, tensor in batch.calls[position].contents.tensors:
            if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or not tensor.numel():
                continue
            lowest, highest = (int(bound) for bound in tensor.detach().aminmax())
            is_ignored = lowest == _IGNORED or (lowest in _ALSO_IGNORED and _LABELS.search(name) is not None)
            if lowest == highest and is_ignored:
                yield name, lowest, tensor.numel()
