"""The flight recorder: a ring of compact rows on the device, read only when somebody asks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.records import GradientRecord, StepRecord
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.ops.device import Readback

_MOST_BYTES = 64 << 20  # of the parameters' own figures; beyond them only the steps' sums are kept
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

    Of each parameter it keeps the very table that the scan has made: no copy, no launch.

    Args:
        length: Number of steps.
        names: Of the parameters.
        limit: See `StepRecord.limit`.
    """

    def __init__(self, length: int, names: Sequence[str], limit: float | None) -> None:
        self._length = length
        self._names = names
        self._limit = limit
        self._rows: Readback | None = None
        self._stamps: list[_Stamp] = []
        self._tables: deque[tuple[torch.Tensor, Sequence[Piece]]] = deque()  # of the last steps
        self._written = 0
        self._handed = 0  # rows that `fresh` has returned

    def begin(
        self, step: int, loss_scale: float, packed: torch.Tensor, pieces: Sequence[Piece], loss: torch.Tensor | None
    ) -> None:
        """Writes what is known before the optimizer's step: `packed` is a `StatsTable.packed` of those pieces."""
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
        self._tables.append((packed, pieces))
        most = max(1, _MOST_BYTES // max(1, packed.nbytes))
        while len(self._tables) > min(most, self._length):
            self._tables.popleft()

    def end(self, applied: bool) -> None:
        """Completes the step that was begun last."""
        self._stamps[-1].applied = applied

    def read(self) -> list[StepRecord]:
        """Returns the steps that are kept, oldest first. Waits for rows that are still on their way."""
        return self._records(self._written - len(self._stamps), wait=True)

    def fresh(self, wait: bool) -> list[StepRecord]:
        """Returns the steps that it has not returned yet, oldest first.

        Args:
            wait: Whether to wait for rows that are still on their way from the device; else they come the next time,
                which of steps that are over is at most the last. Nothing else on the device is waited for.
        """
        begin = max(self._handed, self._written - len(self._stamps))
        records = self._records(begin, wait)
        self._handed = begin + len(records)
        return records

    def _records(self, begin: int, wait: bool) -> list[StepRecord]:
        """The steps from the one of that ordinal number on, up to the first whose row has not arrived."""
        records: list[StepRecord] = []
        for number in range(begin, self._written):
            row = None if self._rows is None else self._rows.read(number, wait)
            if row is None:
                break
            behind = number - self._written
            table = self._tables[behind] if -behind <= len(self._tables) else None
            records.append(self._step_record(self._stamps[behind], row, table))
        return records

    def _step_record(
        self, stamp: _Stamp, row: list[float], table: tuple[torch.Tensor, Sequence[Piece]] | None
    ) -> StepRecord:
        return StepRecord(
            step=stamp.step,
            loss=row[_LOSS] if stamp.has_loss else None,
            loss_scale=stamp.loss_scale,
            absmax=row[_ABSMAX],
            norm=math.sqrt(row[_SUMSQ]),
            nonfinite=int(row[_NONFINITE]),
            applied=stamp.applied,
            limit=self._limit,
            parameters={} if table is None else _Parameters(self._names, *table),
        )


class _Parameters(Mapping[str, GradientRecord]):
    """A table's rows by name. Copied to the host when somebody first looks."""

    def __init__(self, names: Sequence[str], packed: torch.Tensor, pieces: Sequence[Piece]) -> None:
        self._names = names
        self._packed = packed
        self._pieces = pieces
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
            packed = self._packed.cpu()
            nonfinite = packed[:, :3].sum(dim=1).tolist()
            figures = packed.view(torch.float64)[:, 6:].tolist()
            self._records = {}
            for piece, bad, (absmax, sumsq) in zip(self._pieces, nonfinite, figures, strict=True):
                if piece.parameter >= 0:
                    name = self._names[piece.parameter]
                    record = GradientRecord(absmax, math.sqrt(sumsq), bad)
                    before = self._records.get(name)
                    self._records[name] = record if before is None else _together(before, record)
        return self._records


def _together(left: GradientRecord, right: GradientRecord) -> GradientRecord:
    """What two pieces of one parameter are together."""
    return GradientRecord(
        max(left.absmax, right.absmax), math.hypot(left.norm, right.norm), left.nonfinite + right.nonfinite
    )
