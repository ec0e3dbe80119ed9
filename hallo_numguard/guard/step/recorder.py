"""The flight recorder: a ring of compact rows on the device, read only on demand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.records import GradientRecord, StepRecord
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.step.figure_exchange import PART, norm_of
from hallo_numguard.ops.device import AsyncHostCopy, HostRing

MAX_TABLE_BYTES = 64 << 20  # beyond it only totals of the steps are kept
ROW_WIDTH = len(PART) + 1
_NAN, _INF, _ABSMAX, _SUMSQ, _LOSS = range(ROW_WIDTH)


@dataclass
class _Stamp:
    """The part of a step's record that needs no read of the device."""

    step: int
    loss_scale: float
    loss_on: torch.device | None  # the device that the loss was made on; None: there was none
    is_of_backward: bool = False
    applied: bool = False
    nonfinite: AsyncHostCopy | None = None  # where the optimizer decides: it applies the step if the first number is 0


class Recorder:
    """Keeps the last steps. Writing does not synchronise and allocates nothing that stays.

    Figures of parameters are the scan's own table: no copy, no launch.

    Args:
        length: Number of steps to keep.
        names: Names of the parameters.
        limit: See `StepRecord.limit`.
        is_part: Whether this rank holds a slice of the gradients, and `complete` will give the figures of all ranks.

    Attributes:
        bad_losses: Steps whose loss was not finite, of several micro-batches any, among those returned last. Only
            losses that a backward pass has begun at count.
    """

    def __init__(self, length: int, names: Sequence[str], limit: float | None, is_part: bool = False) -> None:
        self._length = length
        self._names = list(names)
        self._limit = limit
        self._is_part = is_part
        self._rows: HostRing | None = None
        self._losses: dict[torch.device, HostRing] = {}  # by device, where it is not that of the rows
        self._stamps: list[_Stamp] = []
        self._tables: deque[ScannedPieces] = deque()  # of the last steps
        self._written = 0
        self._sent = 0  # rows that are complete, and on their way to the host
        self._returned = 0  # rows that `fresh` has returned
        self.bad_losses: set[int] = set()

    def add_names(self, names: Sequence[str]) -> None:
        """Adds the names of parameters that follow the known ones."""
        self._names += names

    def begin(
        self,
        step: int,
        loss_scale: float,
        gradients: ScannedPieces,
        loss: torch.Tensor | None = None,
        is_of_backward: bool = False,
        whole: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the figures that are known before the optimizer's step.

        Args:
            step: Number of the step.
            loss_scale: Loss scale.
            gradients: Scan of this rank's gradients.
            loss: Loss of the step; None if unknown.
            is_of_backward: Whether backward passes have begun at it.
            whole: Figures of the whole model's gradients, as in `figure_exchange.PART`. Default: those of the scan.

        Returns:
            The figures that were written.
        """
        table = gradients.table
        if self._rows is None:
            self._rows = HostRing(self._length, ROW_WIDTH, table.packed.device)
        row = self._rows.row(self._written)
        if whole is not None:
            row[:_LOSS].copy_(whole, non_blocking=True)
        else:
            counts = table.nonfinite_counts.sum(dim=0)
            row[_NAN], row[_INF] = counts[0], counts[1:].sum()
            row[_ABSMAX] = table.absmax.amax() if len(table) else 0.0
            row[_SUMSQ] = table.sumsq.sum()
        if loss is not None:
            self._loss_at(row, loss.device).copy_(loss.detach().reshape(()))
        self._stamps.append(_Stamp(step, loss_scale, None if loss is None else loss.device, is_of_backward))
        del self._stamps[: -self._length]
        self._written += 1
        if not self._is_part:
            self.complete(None)
        self._tables.append(gradients)
        capacity = max(1, MAX_TABLE_BYTES // max(1, table.packed.nbytes))
        while len(self._tables) > min(capacity, self._length):
            self._tables.popleft()
        return row[:_LOSS]

    def _loss_at(self, row: torch.Tensor, device: torch.device) -> torch.Tensor:
        """0-dim float64: where the loss of the step with that row is written. With offload it is made elsewhere."""
        if device == row.device:
            return row[_LOSS]
        if device not in self._losses:
            self._losses[device] = HostRing(self._length, 1, device)
        return self._losses[device].row(self._written)[0]

    def complete(self, whole: torch.Tensor | None) -> None:
        """Gives the step that was begun last the figures of all ranks; None where they stay this rank's."""
        if self._rows is None or self._sent == self._written:
            return
        if whole is not None:
            self._rows.row(self._written - 1)[:_LOSS].copy_(whole, non_blocking=True)
        for number in range(self._sent, self._written):
            self._rows.send(number)
            for losses in self._losses.values():
                losses.send(number)
        self._sent = self._written

    def last_norm(self) -> torch.Tensor:
        """Returns the unscaled norm of the step that was begun last: 0-dim float64, NaN if there is none. No host sync.

        `complete` comes before it.
        """
        if self._rows is None or not self._stamps:
            return torch.tensor(math.nan, dtype=torch.float64)
        return norm_of(self._rows.row(self._written - 1)[:_LOSS]) / self._stamps[-1].loss_scale

    def end(self, applied: bool) -> None:
        """Completes the step that was begun last."""
        self._stamps[-1].applied, self._stamps[-1].nonfinite = applied, None

    def leave_to_the_optimizer(self, nonfinite: AsyncHostCopy) -> None:
        """Lets `read` say of the step that was begun last whether it was applied, until `end` does.

        Args:
            nonfinite: Numbers of which the first is 0 if the optimizer applies the step.
        """
        self._stamps[-1].nonfinite = nonfinite

    def read(self) -> list[StepRecord]:
        """Returns the steps that are kept, oldest first. Waits for rows that are still on their way."""
        return self._records(self._written - len(self._stamps), wait=True)

    def fresh(self, wait: bool) -> list[StepRecord]:
        """Returns the steps not returned before, oldest first.

        Args:
            wait: Whether to wait for rows that are still on their way from the device; else they come the next time,
                which concerns the last finished step at most, and always does where `complete` has not come yet.
                Nothing else on the device is waited for.
        """
        begin = max(self._returned, self._written - len(self._stamps))
        records = self._records(begin, wait)
        self._returned = begin + len(records)
        return records

    def _records(self, begin: int, wait: bool) -> list[StepRecord]:
        """The steps from an ordinal number on, up to the first whose row has not arrived."""
        records: list[StepRecord] = []
        self.bad_losses = set()
        for number in range(begin, self._sent):
            behind = number - self._written
            stamp = self._stamps[behind]
            row = self._row(number, stamp, wait)
            if row is None:
                break
            gradients = self._tables[behind] if -behind <= len(self._tables) else None
            if stamp.is_of_backward and stamp.loss_on is not None and not math.isfinite(row[_LOSS]):
                self.bad_losses.add(stamp.step)
            records.append(self._step_record(stamp, row, gradients))
        return records

    def _row(self, number: int, stamp: _Stamp, wait: bool) -> list[float] | None:
        row = None if self._rows is None else self._rows.read(number, wait)
        if row is None or stamp.loss_on not in self._losses:
            return row
        loss = self._losses[stamp.loss_on].read(number, wait)
        return None if loss is None else [*row[:_LOSS], *loss]

    def _step_record(self, stamp: _Stamp, row: list[float], gradients: ScannedPieces | None) -> StepRecord:
        nan, inf = int(row[_NAN]), int(row[_INF])
        norm = math.sqrt(row[_SUMSQ])
        return StepRecord(
            step=stamp.step,
            loss=None if stamp.loss_on is None else row[_LOSS],
            loss_scale=stamp.loss_scale,
            absmax=row[_ABSMAX],
            norm=math.nan if nan else math.inf if inf else norm,
            nonfinite=nan + inf,
            applied=stamp.applied if stamp.nonfinite is None else stamp.nonfinite.read()[0].item() == 0,
            limit=self._limit,
            parameters={} if gradients is None else _GradientRecords(self._names, gradients),
        )


class _GradientRecords(Mapping[str, GradientRecord]):
    """A table's rows by parameter name. Copied to the host at the first access."""

    def __init__(self, names: Sequence[str], gradients: ScannedPieces) -> None:
        self._names = names
        self._gradients = gradients
        self._records: dict[str, GradientRecord] | None = None

    def __getitem__(self, name: str) -> GradientRecord:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())

    def _read(self) -> dict[str, GradientRecord]:
        if self._records is None:
            self._records = {}
            for piece, row in zip(self._gradients.pieces, self._gradients.table.to_host(), strict=True):
                if piece.parameter >= 0:
                    name = self._names[piece.parameter]
                    record = GradientRecord(row.absmax, math.sqrt(row.sumsq), row.nonfinite)
                    before = self._records.get(name)
                    self._records[name] = record if before is None else _together(before, record)
        return self._records


def _together(left: GradientRecord, right: GradientRecord) -> GradientRecord:
    """Combines the figures of two pieces of one parameter."""
    return GradientRecord(
        max(left.absmax, right.absmax), math.hypot(left.norm, right.norm), left.nonfinite + right.nonfinite
    )
