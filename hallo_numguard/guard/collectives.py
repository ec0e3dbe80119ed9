"""Collectives of the guard: every reduction is of a fixed size, so all ranks take the same path."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from hallo_numguard.core.run_description import new_run_id
from hallo_numguard.core.safe_text import printable
from hallo_numguard.guard.parameter_stats import NONE, ParameterStats
from hallo_numguard.guard.rendezvous import Rendezvous

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")

MAX_TEXT_BYTES = 4096
_RANK_BITS = 31
_NOBODY = 1 << 62  # greater than any order and rank
_SECONDS_AT_EXIT = 0.05


class Place(NamedTuple):
    """A rank's part in a model that is cut, or whose layers are on several ranks, and held in several copies.

    Attributes:
        copy: Number of the copy that the rank's part belongs to.
        shard: Number of the part, or of the stage of a pipeline.
        copies: How many copies there are.
    """

    copy: int
    shard: int
    copies: int


class Ranks:
    """The ranks that train one model together. With one process, everything here is the identity.

    Args:
        group: Process group. Default: the default one.
        alone: Whether this rank trains by itself, even where other ranks exist.
        place: This rank's part, if model parallelism has cut the model; on all ranks, or on none.

    Attributes:
        rank: Global rank of this process.
        alone_because: Why this rank judges the present step by itself; "" if it does not.
        place: As given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False, place: Place | None = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.alone_because = ""
        self.place = place
        self._where = ""  # inside of `assembled`
        self._size = 1
        self._group = group
        self._rendezvous: Rendezvous | None = None
        if ready and not alone:
            self.join(group)

    def join(self, group: dist.ProcessGroup | None) -> None:
        """Reduces over `group` from now on. All of its ranks must call it before the same reduction."""
        self._group = group
        self._size = dist.get_world_size(group)
        if self._size > 1:
            self._rendezvous = Rendezvous.of(group)
            _let_collectives_end_at_exit()

    def are(self, group: dist.ProcessGroup | None) -> bool:
        """Returns whether reductions go over this very group, so that they can stand in for one of another's."""
        return group is self._group

    @property
    def size(self) -> int:
        """Number of ranks that are reduced over."""
        return 1 if self.alone_because else self._size

    @property
    def position(self) -> int:
        """Position of this rank among those that are reduced over."""
        return dist.get_rank(self._group) if self.size > 1 else 0

    @functools.cached_property
    def run_id(self) -> str:
        """Name of the run, the same on all ranks; see `new_run_id`."""
        mine = new_run_id()
        return mine if self._rendezvous is None else self._rendezvous.agreed("run", mine)

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one to log what all of them have found."""
        return self.rank == 0 or self.size == 1

    def leave(self) -> None:
        """Says that this rank takes part in nothing any more, so that the others do not wait for it."""
        if self._rendezvous is not None:
            self._rendezvous.leave()

    @contextlib.contextmanager
    def assembled(self, where: str, alone_because: str = "") -> Iterator[None]:
        """Waits for the other ranks. If one does not come, everything inside is done by this rank alone.

        Inside they meet before each reduction, which raises `PeerFailed` if one of them calls `fail(where)`.

        Args:
            where: Name of the place, the same on all ranks, and never used before.
            alone_because: Why the others are not expected; "" if they are.
        """
        if not alone_because and self._rendezvous is not None and not self._rendezvous.meet(where):
            alone_because = "not every rank has come to this step with bad gradients"
        before = self.alone_because, self._where
        self.alone_because, self._where = (alone_because if self._size > 1 else ""), where
        try:
            yield
        finally:
            self.alone_because, self._where = before

    def collectives_met(self, where: str) -> contextlib.AbstractContextManager[Any]:
        """Makes ranks meet before each collective of the model inside; see `Rendezvous.collectives_met`."""
        return contextlib.nullcontext() if self._rendezvous is None else self._rendezvous.collectives_met(where)

    def fail(self, where: str) -> None:
        """Says that this rank comes to no more collectives inside of `assembled` or `collectives_met` at that place."""
        if self.size > 1 and self._rendezvous is not None:
            self._rendezvous.fail(where)

    def highest(self, value: int, device: torch.device) -> int:
        """Returns the maximum over the ranks. Synchronises."""
        return int(self._reduce(torch.tensor([value], device=device), dist.ReduceOp.MAX).item())

    def lowest(self, value: int, device: torch.device) -> int:
        """Returns the minimum over the ranks. Synchronises."""
        return int(self._reduce(torch.tensor([value], device=device), dist.ReduceOp.MIN).item())

    def total(self, value: int, device: torch.device) -> int:
        """Returns the sum over the ranks. Synchronises."""
        return int(self._reduce(torch.tensor([value], device=device), dist.ReduceOp.SUM).item())

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks. No host sync."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def sum_among(self, group: dist.ProcessGroup, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum over a group of some of these ranks, this one among them. No host sync."""
        if self.size > 1 and dist.get_world_size(group) > 1:
            if self._where and self._rendezvous is not None:
                self._rendezvous.meet_before(self._where, tuple(dist.get_process_group_ranks(group)))
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
        return value

    def start_sum(self, value: torch.Tensor) -> Any:
        """Starts to add up a contiguous tensor over the ranks, in place. Returns the handle to wait for. No wait."""
        return dist.all_reduce(value, op=dist.ReduceOp.SUM, group=self._group, async_op=True)

    def start_maximum(self, value: torch.Tensor) -> Any:
        """Does the same as `start_sum`, and takes the maximum."""
        return dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the mean over the ranks. No host sync."""
        return self._reduce(value / self.size, dist.ReduceOp.SUM)

    def any(self, marks: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise maximum over the ranks."""
        return self._reduce(marks, dist.ReduceOp.MAX)

    def combine(
        self, local: ParameterStats, sliced: torch.Tensor, is_cut: torch.Tensor | None = None
    ) -> tuple[ParameterStats, torch.Tensor]:
        """Combines the statistics of all ranks.

        Args:
            local: Statistics on this rank, one row per tensor.
            sliced: Whether the ranks hold slices of the tensor, which are added up. Otherwise they hold copies, and the
                copy on the lowest rank where it is not finite counts. bool [n].
            is_cut: Whether model parallelism has cut the tensor: counts of its parts are added up, and the index is
                that in the lowest rank's. bool [n]. Default: none is.

        Returns:
            Statistics of the whole tensors, and for each the lowest rank on which it is not finite (`NONE` if it is
            finite on all), int64 [n].
        """
        rank = self._reduce(torch.where(local.first != NONE, self.rank, NONE), dist.ReduceOp.MIN)
        if self.place is None:
            counts_here = is_named = sliced | (rank == self.rank)
        else:
            is_in_copy = sliced | self._shares(rank, self.place.copy)
            is_named = is_in_copy & self._shares(rank, self.place.shard)
            counts_here = is_named if is_cut is None else is_named | (is_in_copy & is_cut)
        return (
            ParameterStats(
                self._reduce(torch.where(counts_here[:, None], local.counts, 0), dist.ReduceOp.SUM),
                self._reduce(torch.where(is_named, local.first, NONE), dist.ReduceOp.MIN),
                self._reduce(torch.where(counts_here, local.absmax, 0.0), dist.ReduceOp.MAX),
            ),
            rank,
        )

    def _shares(self, rank: torch.Tensor, mine: int) -> torch.Tensor:
        """Whether this rank's number of a copy or shard is that of the named rank, for each tensor."""
        return self._reduce(torch.where(rank == self.rank, mine, NONE), dist.ReduceOp.MIN) == mine

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all ranks, in their order. They are pickled: not for the hot path."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def first_text(self, text: str | None, device: torch.device, order: int = 0) -> str | None:
        """Returns the text of the lowest rank that has one, the same on all ranks; None if none has. Synchronises.

        Every rank sends 4096 bytes; a longer text is dropped. See `clip`.

        Args:
            text: Text of this rank, or None.
            device: Device on which ranks reduce.
            order: Where in the step this rank's text belongs, if ranks may differ in it: the earliest counts.
        """
        words = b"" if text is None else text.encode()
        if len(words) > MAX_TEXT_BYTES:
            _log.error("a text of %d bytes is too long to be sent to other ranks", len(words))
            words = b""
        sender = self.lowest(order << _RANK_BITS | self.rank if words else _NOBODY, device)
        mine = words if words and sender == order << _RANK_BITS | self.rank else b""
        payload = torch.frombuffer(bytearray(mine.ljust(MAX_TEXT_BYTES, b"\0")), dtype=torch.uint8).to(device)
        text_bytes = bytes(self._reduce(payload, dist.ReduceOp.SUM).tolist()).rstrip(b"\0")
        return text_bytes.decode() if text_bytes else None

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        tensor = tensor.contiguous()
        if self.size > 1:
            if self._where and self._rendezvous is not None:
                self._rendezvous.meet_before(self._where)
            dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor


def clip(text: str, size: int) -> str:
    """Returns the beginning of `text`, of at most `size` bytes, without control characters."""
    return printable(text).encode()[:size].decode(errors="ignore")


@functools.cache
def _let_collectives_end_at_exit() -> None:
    """Gives the threads of process groups a moment when the process exits.

    After a collective they let go of its tensor, for which they take Python's lock. Before Python 3.14 a thread that
    comes for the lock when Python is already closing down is ended, and with it the process is aborted: "terminate
    called without an active exception", exit code 134, of a run that was through. Waiting gives them the lock in time.
    """
    atexit.register(time.sleep, _SECONDS_AT_EXIT)
