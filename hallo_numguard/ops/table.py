"""The result of a pass: one packed tensor, and the names of its columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.records import RECORD_FIELDS, Record

_COLUMN = {name: position for position, name in enumerate(RECORD_FIELDS)}
_N_NONFINITE = 3  # the first three columns count NaN, +Inf and -Inf


class StatsTable:
    """Statistics of n segments, on the device of the tensors they came from.

    Every property is a view of `packed` or computed from it on its device, without a host sync; only `to_host`
    synchronises.

    Args:
        packed: int64 [n, 8], one record per row, the columns of `records.RECORD_FIELDS`.
        detail: Whether zeros and subnormals were counted.
    """

    __slots__ = ("detail", "packed")

    def __init__(self, packed: torch.Tensor, detail: bool) -> None:
        self.packed = packed
        self.detail = detail

    @classmethod
    def empty(cls, segments: int = 0) -> StatsTable:
        """Returns the table of empty segments, on the CPU."""
        packed = torch.zeros((segments, len(RECORD_FIELDS)), dtype=torch.int64, device="cpu")
        packed[:, _COLUMN["first_nonfinite"]] = -1
        return cls(packed, detail=False)

    @classmethod
    def concatenate(cls, tables: Sequence[StatsTable]) -> StatsTable:
        """Returns one table with the segments of several, in order, on their common device."""
        if len(tables) == 1:
            return tables[0]
        return cls(torch.cat([table.packed for table in tables]), all(table.detail for table in tables))

    def scaled(self, factor: float) -> StatsTable:
        """Returns the table of the same segments, each element multiplied by a finite factor."""
        packed = self.packed.clone()
        floats = packed.view(torch.float64)
        floats[:, _COLUMN["absmax"]] *= factor
        floats[:, _COLUMN["sumsq"]] *= factor * factor
        return StatsTable(packed, detail=False)

    def to(self, device: torch.device) -> StatsTable:
        """Returns the table on a device. Synchronises if that is another one."""
        return StatsTable(self.packed.to(device), self.detail)

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, rows: slice) -> StatsTable:
        return StatsTable(self.packed[rows], self.detail)

    def __repr__(self) -> str:
        return f"StatsTable({len(self)} segments, device={self.packed.device}, detail={self.detail})"

    def _integers(self, name: str) -> torch.Tensor:
        return self.packed[:, _COLUMN[name]]

    def _floats(self, name: str) -> torch.Tensor:
        return self.packed.view(torch.float64)[:, _COLUMN[name]]

    @property
    def nan(self) -> torch.Tensor:
        """int64 [n]: number of NaN."""
        return self._integers("nan")

    @property
    def pos_inf(self) -> torch.Tensor:
        """int64 [n]: number of +Inf."""
        return self._integers("pos_inf")

    @property
    def neg_inf(self) -> torch.Tensor:
        """int64 [n]: number of -Inf."""
        return self._integers("neg_inf")

    @property
    def zeros(self) -> torch.Tensor:
        """int64 [n]: number of zeros of either sign; only with `detail`."""
        self._needs_detail("zeros")
        return self._integers("zeros")

    @property
    def subnormals(self) -> torch.Tensor:
        """int64 [n]: number of subnormal elements; only with `detail`."""
        self._needs_detail("subnormals")
        return self._integers("subnormals")

    @property
    def first_nonfinite(self) -> torch.Tensor:
        """int64 [n]: flat index inside the segment of the first non-finite element, or -1."""
        return self._integers("first_nonfinite")

    @property
    def absmax(self) -> torch.Tensor:
        """float64 [n]: largest absolute value of the finite elements, 0 if there are none."""
        return self._floats("absmax")

    @property
    def sumsq(self) -> torch.Tensor:
        """float64 [n]: sum of the squares of the finite elements."""
        return self._floats("sumsq")

    @property
    def nonfinite(self) -> torch.Tensor:
        """int64 [n]: number of elements that are NaN or infinite."""
        return self.nonfinite_counts.sum(dim=1)

    @property
    def nonfinite_counts(self) -> torch.Tensor:
        """int64 [n, 3]: number of NaN, +Inf and -Inf."""
        return self.packed[:, :_N_NONFINITE]

    @property
    def finite(self) -> torch.Tensor:
        """int64 [n]: 1 where every element of the segment is finite, else 0."""
        return (self.first_nonfinite < 0).to(torch.int64)

    def norm(self) -> torch.Tensor:
        """float64 [n]: L2 norm; NaN or infinity if the segment holds one, as in torch."""
        norm = torch.where(self.first_nonfinite < 0, self.sumsq.sqrt(), torch.inf)
        return torch.where(self.nan > 0, torch.nan, norm)

    def total_norm(self) -> torch.Tensor:
        """0-dim float64: L2 norm of all segments together; NaN or infinity if there is one."""
        return torch.linalg.vector_norm(self.norm())

    def any_nonfinite(self) -> torch.Tensor:
        """0-dim bool: whether any element is non-finite."""
        return (self.first_nonfinite >= 0).any()

    def found_inf(self) -> torch.Tensor:
        """0-dim float32: 1.0 if any element is non-finite, else 0.0 (torch.amp's convention)."""
        return self.any_nonfinite().to(torch.float32)

    def to_host(self) -> list[Record]:
        """Returns the records as plain Python objects. The one call that synchronises."""
        host = self.packed.cpu()
        integers = host.tolist()
        floats = host.view(torch.float64)[:, 6:].tolist()
        return [
            Record(
                nan=row[0],
                pos_inf=row[1],
                neg_inf=row[2],
                absmax=absmax,
                sumsq=sumsq,
                first_nonfinite=row[5],
                zeros=row[3] if self.detail else None,
                subnormals=row[4] if self.detail else None,
            )
            for row, (absmax, sumsq) in zip(integers, floats, strict=True)
        ]

    def _needs_detail(self, name: str) -> None:
        if not self.detail:
            raise InvalidInput(f"{name} were not counted; ask for them with detail=True")
