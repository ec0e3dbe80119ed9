"""The GPU runtime for launches: the current stream, and copies without a host sync.

The only module of this package that uses `torch.cuda`. On the CPU, where Triton's interpreter runs, all of it is
trivial.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_MIN_CAPACITY = 512  # addresses

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # in builds for CUDA; makes no object of the stream


def has_gpu() -> bool:
    """Returns whether torch sees a GPU."""
    return torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    """Returns a device in words, as "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    if device.type != "cuda":
        return str(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def current_index() -> int:
    """Returns the index of this thread's GPU."""
    return torch.cuda.current_device()


def stream_of(device: torch.device) -> int:
    """Returns the handle of this thread's current stream on `device`; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return _raw_stream(device.index) if _raw_stream is not None else torch.cuda.current_stream(device).cuda_stream


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Makes `device` the target of launches."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def send(words: bytes, device: torch.device) -> torch.Tensor:
    """Returns int64 [n] on `device` with these 8-byte words, copied on the current stream. No host sync.

    Cost: a copy into pinned memory, a copy to the device, an allocation on it. A CUDA graph repeats the copy at every
    replay, from memory that is kept for it for ever.
    """
    host = torch.frombuffer(bytearray(words), dtype=torch.int64)
    if device.type == "cpu":
        return host
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host.pin_memory())
        return _captured[-1].to(device, non_blocking=True)
    return _staging(device).send(host)


def send_to_keep(words: bytes, device: torch.device) -> torch.Tensor:
    """Returns int64 [n] on `device`, as `send` does, to be used by later calls as well.

    Raises:
        RuntimeError: If a CUDA graph is captured, which would copy the words only when it is replayed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and it is the first call with tensors of these sizes, which copies tables "
            "of them to the GPU: make such a call before the capture"
        )
    return send(words, device) if words else torch.empty(0, dtype=torch.int64, device=device)


class HostRing:
    """Rows of float64 on their way from a device to the host; an early read waits.

    On a GPU a row is copied to pinned memory after the work that made it, with an event; by the next step it has
    usually arrived. On the CPU rows are written where they are read.

    Args:
        rows: Number of rows that are kept; row i is overwritten by row i + rows.
        width: Numbers in a row.
        device: Device on which the rows are made.

    Attributes:
        device: That device.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._made = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self.device = device
        self._host = self._made
        self._arrived: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._host = torch.zeros((rows, width), dtype=torch.float64, device="cpu", pin_memory=True)
            self._arrived = [torch.cuda.Event() for _ in range(rows)]

    def row(self, index: int) -> torch.Tensor:
        """float64 [width]: row `index` on the device, to be written on the current stream."""
        return self._made[index % len(self._made)]

    def send(self, index: int) -> None:
        """Starts the copy of row `index`, once it is written. Cost: a copy of one row and an event; no wait."""
        if self._arrived:
            place = index % len(self._made)
            self._host[place].copy_(self._made[place], non_blocking=True)
            self._arrived[place].record(torch.cuda.current_stream(self.device))

    def read(self, index: int, wait: bool) -> list[float] | None:
        """Returns row `index`, one of those sent last; without `wait`, None if it is still under way."""
        place = index % len(self._made)
        if self._arrived:
            if wait:
                self._arrived[place].synchronize()
            elif not self._arrived[place].query():
                return None
        values: list[float] = self._host[place].tolist()
        return values


class AsyncHostCopy:
    """A tensor on its way to the host, without a host sync. For occasional copies: it allocates.

    Args:
        tensor: Tensor made on the current stream. A tensor on the CPU is not copied, and must not change.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    @property
    def arrived(self) -> bool:
        """Whether the copy is complete."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> torch.Tensor:
        """Returns the tensor on the host; waits if necessary."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


@dataclass
class _Slot:
    """Pinned memory, and the event after the last copy from it."""

    memory: torch.Tensor
    copied: torch.cuda.Event


class _Staging:
    """A ring of pinned buffers for one thread: a buffer is reused only when the copy from it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[_Slot] = []  # the longest unused first

    def send(self, host: torch.Tensor) -> torch.Tensor:
        count = host.numel()
        slot = self._free_slot(count)
        slot.memory[:count].copy_(host)
        words = torch.empty(count, dtype=torch.int64, device=self._device)
        words.copy_(slot.memory[:count], non_blocking=True)
        slot.copied.record(torch.cuda.current_stream(self._device))
        self._slots.append(slot)
        return words

    def _free_slot(self, count: int) -> _Slot:
        if self._slots and self._slots[0].copied.query():
            slot = self._slots.pop(0)
            if slot.memory.numel() >= count:
                return slot
        capacity = max(_MIN_CAPACITY, 1 << (count - 1).bit_length())
        memory = torch.empty(capacity, dtype=torch.int64, device="cpu", pin_memory=True)
        return _Slot(memory, torch.cuda.Event())


_captured: list[torch.Tensor] = []
_local = threading.local()


def _staging(device: torch.device) -> _Staging:
    stagings: dict[torch.device, _Staging] = _local.__dict__.setdefault("stagings", {})
    if device not in stagings:
        stagings[device] = _Staging(device)
    return stagings[device]
