"""Paired timing: a sample stands between two of the same reference; noise hits both alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Protocol

Call = Callable[[], Any]

SAMPLE_NS = 200_000  # a sample of the host's clock repeats its call until it lasts about this long
SLOW = 20  # times a sample of the reference; beyond, a candidate gets fewer rounds
SLOW_SHARE = 0.5  # of the time, or what its fewest rounds take

WARM_UP_CALLS = 3  # of a device: kernels are compiled or loaded, memory is allocated
FLUSHES = 10  # to learn how long one takes
HEAD_START = 1.5  # of the time that the host needs for a call


@dataclass(frozen=True)
class Spent:
    """What one call took.

    Attributes:
        work: Nanoseconds until its work was done.
        host: Nanoseconds until it returned, where it does not wait for its work; else None.
    """

    work: float
    host: float | None


@dataclass(frozen=True)
class Sampler:
    """Takes samples of one call.

    Attributes:
        take: Takes one.
        repeats: Calls that it is the mean of.
        cost: Nanoseconds that taking one costs, roughly.
    """

    take: Callable[[], Spent]
    repeats: int
    cost: float


class Clock(Protocol):
    """How long calls take on a device."""

    def sampler(self, call: Call) -> Sampler:
        """Returns what times `call`, which has been called before."""


class HostClock:
    """Times calls that return when their work is done.

    Args:
        warm: Whether every sample follows as many untimed calls. Right where the data stays in a cache, which the
            candidate before may have emptied; pointless where it does not.
    """

    def __init__(self, warm: bool) -> None:
        self._warm = warm

    def sampler(self, call: Call) -> Sampler:
        """See `Clock`. What is too short to be timed alone is repeated."""
        cost = _nanoseconds(call, 1)
        if cost < SAMPLE_NS:
            repeats = _repeats(cost)
            _nanoseconds(call, repeats)
            cost = _nanoseconds(call, repeats)
        repeats = _repeats(cost)

        def take() -> Spent:
            if self._warm:
                _nanoseconds(call, repeats)
            return Spent(_nanoseconds(call, repeats), None)

        return Sampler(take, repeats, cost * repeats * (2 if self._warm else 1))


class Stream(Protocol):
    """What a device does in order, behind the host's back."""

    def record(self) -> Any:
        """Returns an event that happens when all that was launched so far is done."""

    def elapsed(self, begin: Any, end: Any) -> float:
        """Returns the nanoseconds between two events that have happened."""

    def synchronize(self) -> None:
        """Waits until all that was launched is done."""

    def flush(self) -> None:
        """Launches what leaves nothing of any candidate in the caches."""


class EventClock:
    """Times calls that return before their work is done, by events of the device, on a cold cache.

    Before the first event the device is kept busy with flushing its cache until the host has launched the call, so
    that the time between the events is the device's alone. The host's own is taken apart, with the device idle.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        stream.flush()
        begin = stream.record()
        for _ in repeat(None, FLUSHES):
            stream.flush()
        end = stream.record()
        stream.synchronize()
        self._flush_cost = stream.elapsed(begin, end) / FLUSHES

    def sampler(self, call: Call) -> Sampler:
        """See `Clock`. A second call in the same sample would find in the cache what the first has left there."""
        for _ in repeat(None, WARM_UP_CALLS):
            call()

        def take() -> Spent:
            return self._sample(call)

        return Sampler(take, 1, _nanoseconds(take, 1))

    def _sample(self, call: Call) -> Spent:
        stream = self._stream
        stream.synchronize()
        host = _nanoseconds(call, 1)
        for _ in repeat(None, 1 + math.ceil(HEAD_START * host / self._flush_cost)):
            stream.flush()
        begin = stream.record()
        call()
        end = stream.record()
        stream.synchronize()
        return Spent(stream.elapsed(begin, end), host)


@dataclass
class Series:
    """The samples of one candidate.

    Attributes:
        repeats: Calls a sample.
        nanoseconds: Time of one call, a sample.
        host: Time until it returned, a sample; empty if it waits for its work.
        fractions: Time of the references around it over its own time, a sample.
    """

    repeats: int
    nanoseconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    def add(self, spent: Spent, reference: float) -> None:
        """Adds a sample, and what the reference took around it."""
        self.nanoseconds.append(spent.work)
        self.fractions.append(reference / spent.work)
        if spent.host is not None:
            self.host.append(spent.host)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: What all rounds together may take; the fewest rounds are done in any case.
        fewest, fewest_slow, most: Rounds.
    """

    seconds: float
    fewest: int
    fewest_slow: int
    most: int


def measure(clock: Clock, reference: Call, calls: Mapping[str, Call], effort: Effort) -> dict[str, Series]:
    """Times `calls` in rounds, each in a new order, every sample between two of `reference`.

    Args:
        clock: Of the device that they work on.
        reference: Moves the memory that all calls work on.
        calls: By key; each has been called before.
        effort: How long.
    """
    with no_collections():
        paired = clock.sampler(reference)
        samplers = {key: clock.sampler(call) for key, call in calls.items()}
        series = {key: Series(sampler.repeats) for key, sampler in samplers.items()}
        order = random.Random(0)
        for keys in _rounds({key: sampler.cost for key, sampler in samplers.items()}, paired.cost, effort):
            order.shuffle(keys)
            before = paired.take().work
            for key in keys:
                spent = samplers[key].take()
                after = paired.take().work
                series[key].add(spent, (before + after) / 2)
                before = after
    return series


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the 20th percentile, the median and the 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return (
        ordered[math.floor(0.2 * last)],
        statistics.median(ordered),
        ordered[math.ceil(0.8 * last)],
    )


def _nanoseconds(call: Call, repeats: int) -> float:
    """Of one call, by the host's clock."""
    begin = time.perf_counter_ns()
    for _ in repeat(None, repeats):
        call()
    return (time.perf_counter_ns() - begin) / repeats


def _repeats(cost: float) -> int:
    return max(1, math.ceil(SAMPLE_NS / max(cost, 1.0)))


def _rounds(costs: Mapping[str, float], reference_cost: float, effort: Effort) -> Iterator[list[str]]:
    """The keys of every round; the slow ones are missing from most, evenly."""
    slow = {key for key, cost in costs.items() if cost > SLOW * reference_cost}

    def seconds(keys: set[str]) -> float:
        return sum(costs[key] + reference_cost for key in keys) / 1e9

    def affordable(time_left: float, a_round: float, fewest: int) -> int:
        count = int(time_left / a_round) if a_round > 0 else effort.most
        return min(max(count, fewest), effort.most)

    fewer = affordable(SLOW_SHARE * effort.seconds, seconds(slow), effort.fewest_slow)
    rest = max(effort.seconds - fewer * seconds(slow), (1 - SLOW_SHARE) * effort.seconds)
    total = affordable(rest, seconds(set(costs) - slow), effort.fewest)
    stride = max(1, total // fewer)
    for number in range(total):
        yield [key for key in costs if key not in slow or number % stride == 0]


@contextmanager
def no_collections() -> Iterator[None]:
    """Keeps the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
