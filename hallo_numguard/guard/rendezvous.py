"""Meetings of ranks before a collective, over the key-value store of the process group.

A collective that one rank never enters leaves the others waiting until the process group gives up and aborts the job.
A meeting can end without one: whoever does not come in time, has left, or has failed, is not waited for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

MAX_WAIT_SECONDS = 60.0  # and at most half of what the process group waits in a collective
_LONGEST_NAP_SECONDS = 0.02
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")

_resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group", None)  # by name, torch >= 2.1

_instances: Counter[tuple[int, ...]] = Counter()


class PeerFailed(RuntimeError):
    """Another rank does not come to a collective."""


class Rendezvous:
    """Meetings of the ranks of one guard.

    Args:
        members: Global ranks, the same on each of them.
        wait: Longest time to wait for the others, in seconds.
    """

    def __init__(self, members: Sequence[int], wait: float) -> None:
        self._members = tuple(members)
        self._wait = wait
        self._store = dist.distributed_c10d._get_default_store()
        self._name = f"hallo_numguard/{_name_of(self._members)}/{_instances[self._members]}"
        _instances[self._members] += 1
        self._collectives: Counter[tuple[str, tuple[int, ...]]] = Counter()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Rendezvous | None:
        """Returns the meetings of a group's ranks; None where there is no store."""
        try:
            return cls(dist.get_process_group_ranks(group or dist.group.WORLD), _wait_of(group))
        except (RuntimeError, ValueError, AttributeError):  # launched by MPI
            return None

    def agreed(self, key: str, value: str) -> str:
        """Returns the value of the rank that came first, the same on all ranks. Does not wait for them."""
        try:
            return str(self._store.compare_set(f"{self._name}/{key}", "", value).decode())
        except RuntimeError:  # the store is gone
            return value

    def meet(self, where: str) -> bool:
        """Waits until all ranks are here.

        Args:
            where: Name of the place, the same on all ranks, and never used before.

        Returns:
            Whether all have come: the same on all that have.
        """
        try:
            return self._meet(where, len(self._members), f"{self._name}/left")
        except RuntimeError:  # the store is gone: each rank for itself
            return False

    def leave(self) -> None:
        """Says that this rank will not come to a meeting any more."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the process group
            self._store.set(f"{self._name}/left", "yes")

    def fail(self, where: str) -> None:
        """Says that this rank will not come to the collectives at a place any more."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._name}/{where}/failed", "yes")

    def collectives_met(self, where: str) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which ranks meet before each collective: it is not entered if one of them fails.

        Args:
            where: Name of the place, the same on all ranks, and never used before.

        Raises:
            PeerFailed: In place of a collective to which a rank does not come.
        """
        return _MetCollectives(self, where)

    def meet_before(self, where: str, members: tuple[int, ...] | None = None) -> None:
        """Waits for the ranks of the next collective at a place.

        Args:
            where: Name of the place.
            members: Global ranks that take part in it. Default: all of this guard.

        Raises:
            PeerFailed: If one of them does not come, or has called `fail(where)`.
        """
        members = members or self._members
        number = self._collectives[where, members]
        self._collectives[where, members] += 1
        place = f"{where}/{_name_of(members)}/{number}"
        if not self._meet(place, len(members), f"{self._name}/{where}/failed"):
            raise PeerFailed("another rank does not come")

    def _meet(self, where: str, expected: int, given_up: str) -> bool:
        """Waits until as many ranks as expected have come, or the key `given_up` is set."""
        store, state = self._store, f"{self._name}/{where}/state"
        if store.add(f"{self._name}/{where}/arrived", 1) == expected:
            return bool(store.compare_set(state, "", "all") == b"all")
        deadline, nap = time.monotonic() + self._wait, 0.0005
        longest_nap = min(1.0, _LONGEST_NAP_SECONDS * max(1.0, expected / 64))  # one store answers all of them
        while not store.check([state]):
            if time.monotonic() > deadline or store.check([given_up]):
                store.compare_set(state, "", "some")
                break
            time.sleep(nap)
            nap = min(2 * nap, longest_nap)
        return bool(store.get(state) == b"all")


class _MetCollectives(TorchDispatchMode):
    def __init__(self, rendezvous: Rendezvous, where: str) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._where = where

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _COLLECTIVES:
            members = _members_of((*args, *(kwargs or {}).values()))
            if members is not None:
                self._rendezvous.meet_before(self._where, members)
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=64)
def _name_of(members: tuple[int, ...]) -> str:
    """A name of some ranks that does not grow with their number, for keys of the store."""
    text = "-".join(map(str, members))
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:40]


def _members_of(arguments: Sequence[Any]) -> tuple[int, ...] | None:
    """Global ranks of the process group among the arguments of a collective; None if there is none."""
    for argument in arguments:
        group: Any = None
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
        elif isinstance(argument, str):
            with contextlib.suppress(Exception):
                group = _resolve(argument)
        if group is not None:
            return tuple(dist.get_process_group_ranks(group))
    return None


def _wait_of(group: dist.ProcessGroup | None) -> float:
    """Half of the time that a group waits in a collective, but no more than `MAX_WAIT_SECONDS`."""
    used: Any = group or dist.group.WORLD
    waits = [MAX_WAIT_SECONDS]
    for device in used._device_types:
        timeout = getattr(getattr(used._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            waits.append(timeout.total_seconds() / 2)
    return min(waits)
