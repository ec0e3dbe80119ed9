"""The flight recorder: a ring of compact rows on the device, read only when somebody asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hallo_numguard.ops.device import Readback
from hallo_numguard.records import StepRecord

_NONFINITE, _ABSMAX, _SUMSQ, _LOSS = range(4)


@dataclass
class _Stamp:
    """What the host knows about a step without asking the device."""

    step: int
    loss_scale: float
    has_loss: bool
    applied: bool = False


class Recorder:
    """Keeps the last steps. Writing does not synchronise and allocates nothing that stays.

    Args:
        length: Number of steps.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._rows: Readback | None = None
        self._stamps: list[_Stamp] = []
        self._written = 0

    def begin(self, step: int, loss_scale: float, packed: torch.Tensor, loss: torch.Tensor | None) -> None:
        """Writes what is known before the optimizer's step: `packed` is a `StatsTable.packed`."""
        if self._rows is None:
            self._rows = Readback(self._length, 4, packed.device)
        row = self._rows.row(self._written)
        floats = packed.view(torch.float64)
        row[_NONFINITE] = packed[:, :3].sum()
        row[_ABSMAX] = floats[:, 6].amax() if len(packed) else 0.0
        row[_SUMSQ] = floats[:, 7].sum()
        if loss is not None:
            row[_LOSS] = loss.detach().reshape(())
        self._rows.send(self._written)
        self._stamps.append(_Stamp(step, loss_scale, loss is not None))
        del self._stamps[: -self._length]
        self._written += 1

    def end(self, applied: bool) -> None:
        """Completes the step that was begun last."""
        self._stamps[-1].applied = applied

    def read(self, wait: bool = True, last: int | None = None) -> list[StepRecord]:
        """Returns the steps that are kept, oldest first.

        Args:
            last: Only so many, the latest.
            wait: Whether to wait for rows that are still on their way from the device; else they are left out, which
                of steps that are over is at most the last. Nothing else on the device is waited for.
        """
        if self._rows is None:
            return []
        stamps = self._stamps if last is None else self._stamps[-last:]
        begin = self._written - len(stamps)
        rows = [self._rows.read(begin + position, wait) for position in range(len(stamps))]
        return [_step_record(stamp, row) for stamp, row in zip(stamps, rows, strict=True) if row is not None]


def _step_record(stamp: _Stamp, row: list[float]) -> StepRecord:
    return StepRecord(
        step=stamp.step,
        loss=row[_LOSS] if stamp.has_loss else None,
        loss_scale=stamp.loss_scale,
        absmax=row[_ABSMAX],
        norm=math.sqrt(row[_SUMSQ]),
        nonfinite=int(row[_NONFINITE]),
        applied=stamp.applied,
    )
