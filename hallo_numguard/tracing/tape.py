"""What tensors held, in the order in which they were looked at: launched at once, brought to the host in batches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.ops.layout import unravel
from hallo_numguard.ops.stats import multi_tensor_stats
from hallo_numguard.records import Record
from hallo_numguard.tracing.frames import TensorRecord

BATCH = 64  # looks between two copies to the host
_AROUND = 4  # values on either side of the first bad one


@dataclass(eq=False)
class Held:
    """A tensor as it was at one moment.

    Attributes:
        shape, dtype: Of it.
        row: Of the tape.
        hooked: Whether its gradient will be looked at.
        gradient: What that was, once a backward pass has given it.
        made_by: Position of the call that returned it; None if none did.
        order: Of a gradient, its place in the order in which they came.
    """

    shape: tuple[int, ...]
    dtype: str
    row: int
    hooked: bool = False
    gradient: Held | None = None
    made_by: int | None = None
    order: int = -1


class Tape:
    """Looks at tensors without waiting for the device, but once in `BATCH` looks.

    Every tensor is read once, however many modules it goes through: one that is the same object, with the same memory
    and not written to since, has been seen.

    Args:
        whole: Whether to keep values around the first non-finite element, for which tensors live on until their batch
            is on the host.
    """

    def __init__(self, whole: bool = True) -> None:
        self._whole = whole
        self._rows = 0
        self._waiting: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        self._host: list[list[int]] = []  # a packed record a row
        self._figures: list[list[float]] = []
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, int, Held]] = {}
        self._bad = False
        self.neighbours: dict[int, tuple[float, ...]] = {}

    @property
    def bad(self) -> bool:
        """Whether anything that has arrived was NaN or infinite."""
        return self._bad

    def look(self, tensors: Sequence[torch.Tensor]) -> list[Held]:
        """Returns what the tensors hold now: one launch for those that were not seen before."""
        held = [self._known(tensor) for tensor in tensors]
        new = [position for position, item in enumerate(held) if item is None]
        if new:
            fresh = [tensors[position].detach() for position in new]
            self._waiting.append((multi_tensor_stats(fresh).packed, fresh if self._whole else ()))
            for position in new:
                held[position] = self._remember(tensors[position])
            if len(self._waiting) >= BATCH:
                self.flush()
        return [item for item in held if item is not None]

    def _known(self, tensor: torch.Tensor) -> Held | None:
        seen = self._seen.get(id(tensor))
        if seen is None:
            return None
        reference, version, address, held = seen
        is_same = reference() is tensor and version == _version(tensor) and address == tensor.data_ptr()
        return held if is_same else None

    def _remember(self, tensor: torch.Tensor) -> Held:
        held = Held(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), self._rows)
        self._rows += 1
        self._seen[id(tensor)] = (weakref.ref(tensor), _version(tensor), tensor.data_ptr(), held)
        return held

    def flush(self) -> None:
        """Brings what is waiting to the host. Synchronises."""
        for packed, tensors in self._waiting:
            host = packed.cpu()
            begin = len(self._host)
            self._host += host.tolist()
            self._figures += host.view(torch.float64)[:, 6:].tolist()
            for position, tensor in enumerate(tensors):
                first = self._host[begin + position][5]
                if first >= 0 and len(self.neighbours) < BATCH:
                    around = tensor.reshape(-1)[max(0, first - _AROUND) : first + _AROUND + 1]
                    self.neighbours[begin + position] = tuple(around.double().tolist())
            self._bad = self._bad or any(row[5] >= 0 for row in self._host[begin:])
        self._waiting.clear()
        self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}

    def record(self, held: Held) -> Record:
        """Returns what a tensor held. Synchronises if that is still waiting."""
        if held.row >= len(self._host):
            self.flush()
        nan, pos_inf, neg_inf, _, _, first, *_ = self._host[held.row]
        absmax, sumsq = self._figures[held.row]
        return Record(nan, pos_inf, neg_inf, absmax, sumsq, first)

    def tensor_record(self, name: str, held: Held) -> TensorRecord:
        """Returns the same, named, for a frame."""
        record = self.record(held)
        first = record.first_nonfinite
        return TensorRecord(name, held.shape, held.dtype, record, unravel(first, held.shape) if first >= 0 else ())


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
