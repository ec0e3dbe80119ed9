"""Statistics of tensors in the order in which they were read: launched at once, copied to the host in batches."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.frames import TensorRecord
from hallo_numguard.core.records import Record
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.formats import dtype_name
from hallo_numguard.ops.layout import unravel
from hallo_numguard.tracing.nested import as_plain

BATCH = 64  # launches between two copies to the host
MAX_WAITING_BYTES = 256 << 20  # bytes of tensors that live on because their records are not on the host yet
_AROUND = 4  # values on either side of the first bad one


@dataclass(eq=False)
class TensorSnapshot:
    """A tensor as it was at one moment.

    Attributes:
        shape, dtype: Shape and dtype of the tensor.
        row: Row of the tape with its statistics.
        hooked: Whether its gradient will be read.
        gradient: Snapshot of its gradient, once a backward pass has computed it.
        made_by: Position of the call that returned the tensor; None without one.
        order: Position of a gradient in the order of arrival.
    """

    shape: tuple[int, ...]
    dtype: str
    row: int
    hooked: bool = False
    gradient: TensorSnapshot | None = None
    made_by: int | None = None
    order: int = -1


class Tape:
    """Scans tensors, with one host sync in `BATCH` scans.

    On a CPU records are read at once, so that no tensor lives longer than without the tape.

    Every tensor is read once, however many modules use it: the same object, with the same memory and version, is
    not read a second time.

    Args:
        whole: Whether to keep values around the first non-finite element. Tensors then live on until their batch is on
            the host, up to 256 MiB.
    """

    def __init__(self, whole: bool = True) -> None:
        self._whole = whole
        self._rows = 0
        self._waiting: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        self._waiting_bytes = 0
        self._host: list[list[int]] = []  # one packed record per row
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, int, TensorSnapshot]] = {}
        self._max_seen = BATCH
        self._bad = 0
        self.neighbours: dict[int, tuple[float, ...]] = {}

    @property
    def bad(self) -> int:
        """Number of tensors that have arrived and were not all finite."""
        return self._bad

    def snapshot(self, tensors: Sequence[torch.Tensor]) -> list[TensorSnapshot]:
        """Returns the present contents of the tensors: one launch for those not seen before."""
        held = [self._known(tensor) for tensor in tensors]
        new = [position for position, item in enumerate(held) if item is None]
        if new:
            fresh = [as_plain(tensors[position]) for position in new]
            for position in new:
                held[position] = self._remember(tensors[position])
            self._launch(fresh)
        return [item for item in held if item is not None]

    def _launch(self, tensors: Sequence[torch.Tensor]) -> None:
        packed = multi_tensor_stats(tensors).packed
        self._waiting.append((packed, tensors if self._whole else ()))
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors)
        if packed.is_cpu or len(self._waiting) >= BATCH or self._waiting_bytes > MAX_WAITING_BYTES:
            self.flush()

    def _known(self, tensor: torch.Tensor) -> TensorSnapshot | None:
        seen = self._seen.get(id(tensor))
        if seen is None:
            return None
        reference, version, address, held = seen
        is_same = reference() is tensor and version == _version(tensor) and address == tensor.data_ptr()
        return held if is_same else None

    def _remember(self, tensor: torch.Tensor) -> TensorSnapshot:
        held = TensorSnapshot(tuple(tensor.shape), dtype_name(tensor.dtype), self._rows)
        self._rows += 1
        self._seen[id(tensor)] = (weakref.ref(tensor), _version(tensor), tensor.data_ptr(), held)
        if len(self._seen) > self._max_seen:
            self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
            self._max_seen = 2 * len(self._seen) + BATCH
        return held

    def flush(self) -> None:
        """Copies the waiting records to the host. Synchronises."""
        for packed, tensors in self._waiting:
            begin = len(self._host)
            self._host += packed.tolist()
            for position, tensor in enumerate(tensors):
                first = self._host[begin + position][5]
                if first >= 0 and len(self.neighbours) < BATCH:
                    around = tensor.reshape(-1)[max(0, first - _AROUND) : first + _AROUND + 1]
                    self.neighbours[begin + position] = tuple(around.double().tolist())
            self._bad += sum(row[5] >= 0 for row in self._host[begin:])
        self._waiting.clear()
        self._waiting_bytes = 0

    def record(self, held: TensorSnapshot) -> Record:
        """Returns the record of a snapshot. Synchronises if it is still waiting."""
        if held.row >= len(self._host):
            self.flush()
        nan, pos_inf, neg_inf, _, _, first, *figures = self._host[held.row]
        absmax, sumsq = struct.unpack("=2d", struct.pack("=2q", *figures))
        return Record(nan, pos_inf, neg_inf, absmax, sumsq, first)

    def tensor_record(self, name: str, held: TensorSnapshot) -> TensorRecord:
        """Returns the record of a snapshot with a name, for a frame."""
        record = self.record(held)
        first = record.first_nonfinite
        return TensorRecord(name, held.shape, held.dtype, record, unravel(first, held.shape) if first >= 0 else ())


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
