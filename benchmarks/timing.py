"""Paired and alternating timing, so that noise hits all candidates alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress, repeat
from typing import Any

from cuda_runtime import CudaRuntime

Call = Callable[[], Any]

WARM_UP_ROUNDS = 2

SAMPLE_NS = 200_000  # a sample of the host's clock repeats its call until it lasts about this long
MAX_ROUNDS = 300
MIN_SLOW_ROUNDS = 3
SLOW_RATIO = 20  # over a sample of the reference; beyond it, a candidate gets fewer rounds
MAX_SLOW_SHARE = 0.1  # part of the time that a slow candidate may take, beyond its fewest rounds

OWN_CORE_PROBES = 200
SHARED_CORE = 1.15  # over the least share of a core; beyond it, another thread had a part
MIN_UNDIVIDED = 3  # samples that are enough without the others

GPU_WARM_UP_CALLS = 3  # kernels are compiled or loaded, memory is allocated
TIMED_FLUSHES = 10
HEAD_START = 1.5  # flushes queued before a call, over the time that the host needs for it


def alternate(
    calls: Mapping[str, Call], rounds: int, prepare: Call | None = None, after: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Times calls in rounds, each in a new order, after two rounds that are not counted.

    Args:
        calls: What to time, by name.
        rounds: Samples of each.
        prepare: Called before each sample, untimed.
        after: Called with the name after each sample that counts, untimed.

    Returns:
        Seconds of each sample, by name; samples of one round stand at the same place.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    with no_collections():
        for number in range(rounds + WARM_UP_ROUNDS):
            for name in order.sample(list(calls), len(calls)):
                if prepare is not None:
                    prepare()
                begin = time.perf_counter()
                calls[name]()
                spent = time.perf_counter() - begin
                if number >= WARM_UP_ROUNDS:
                    seconds[name].append(spent)
                    if after is not None:
                        after(name)
    return seconds


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Returns the median over the rounds of one candidate's time over another's."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


@dataclass(frozen=True)
class Spent:
    """What one call took.

    Attributes:
        work: Nanoseconds until its work was done.
        host: Nanoseconds until it returned, if it does not wait for its work; else None.
    """

    work: float
    host: float | None


@dataclass(frozen=True)
class Sampler:
    """Takes samples of one call.

    Attributes:
        take: Takes one.
        repeats: Calls that a sample is the mean of.
    """

    take: Callable[[], Spent]
    repeats: int


Clock = Callable[[Call], Sampler]


def host_clock(warm: bool) -> Clock:
    """Returns a clock for calls that return when their work is done. What is too short to be timed is repeated.

    Args:
        warm: Whether every sample follows as many untimed calls. Right where the data stays in a cache, which the
            candidate before may have emptied; pointless where it does not.
    """

    def sampler(call: Call) -> Sampler:
        cost = _nanoseconds(call, 1)
        if cost < SAMPLE_NS:
            repeats = _repeats(cost)
            _nanoseconds(call, repeats)
            cost = _nanoseconds(call, repeats)
        repeats = _repeats(cost)

        def take() -> Spent:
            if warm:
                _nanoseconds(call, repeats)
            return Spent(_nanoseconds(call, repeats), None)

        return Sampler(take, repeats)

    return sampler


def event_clock(runtime: CudaRuntime) -> Clock:
    """Returns a clock for calls that return before their work is done, by events of the GPU, on a cold cache.

    Before the first event the GPU is kept busy with flushing its cache until the host has launched the call, so that
    the time between the events is the GPU's alone. The host's own is taken apart, with the GPU idle. A second call in
    the same sample would find in the cache what the first has left there.
    """
    runtime.flush()
    begin = runtime.record()
    for _ in repeat(None, TIMED_FLUSHES):
        runtime.flush()
    end = runtime.record()
    runtime.synchronize()
    flush_cost = runtime.elapsed(begin, end) / TIMED_FLUSHES

    def sampler(call: Call) -> Sampler:
        for _ in repeat(None, GPU_WARM_UP_CALLS):
            call()

        def take() -> Spent:
            runtime.synchronize()
            host = _nanoseconds(call, 1)
            for _ in repeat(None, 1 + math.ceil(HEAD_START * host / flush_cost)):
                runtime.flush()
            begin = runtime.record()
            call()
            end = runtime.record()
            runtime.synchronize()
            return Spent(runtime.elapsed(begin, end), host)

        return Sampler(take, 1)

    return sampler


@dataclass
class Series:
    """The samples of one candidate.

    Attributes:
        repeats: Calls in a sample.
        nanoseconds: Time of one call.
        host: Time until it returned; empty if it waits for its work.
        fractions: Time of the references around it over its own time.
    """

    repeats: int
    nanoseconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    on_own_core: list[bool] = field(default_factory=list)

    def add(self, spent: Spent, reference: float, on_own_core: bool = True) -> None:
        """Adds a sample, the nanoseconds of the reference around it, and whether no other thread shared the core."""
        self.nanoseconds.append(spent.work)
        self.fractions.append(reference / spent.work)
        self.on_own_core.append(on_own_core)
        if spent.host is not None:
            self.host.append(spent.host)

    def leave_out_divided(self) -> None:
        """Leaves out the samples of a divided core, unless too few others remain."""
        if sum(self.on_own_core) >= MIN_UNDIVIDED and not self.host:
            self.nanoseconds = list(compress(self.nanoseconds, self.on_own_core))
            self.fractions = list(compress(self.fractions, self.on_own_core))
            self.on_own_core = [True] * len(self.fractions)

    def exceeds_share(self, elapsed: float) -> bool:
        """Whether these are the samples of a slow call that has had enough of the elapsed seconds."""
        if len(self.nanoseconds) < MIN_SLOW_ROUNDS or self.fractions[-1] * SLOW_RATIO >= 1:
            return False
        return sum(self.nanoseconds) * self.repeats > MAX_SLOW_SHARE * elapsed * 1e9


def measure(
    clock: Clock,
    reference: Call,
    calls: Mapping[str, Call],
    seconds: float,
    min_rounds: int,
    max_rounds: int = MAX_ROUNDS,
    is_undivided: Callable[[], bool] = lambda: True,
) -> dict[str, Series]:
    """Times calls in rounds, each in a new order, every sample between two of the reference.

    Slow calls are left out of rounds in which they have had their share of the time.

    Args:
        clock: Clock of the device that they work on.
        reference: Call that moves the memory that all work on.
        calls: What to time, by key; each has been called before.
        seconds: Time for all rounds together.
        min_rounds: Rounds that are done in any case.
        max_rounds: Rounds that are enough in any case.
        is_undivided: Asked beside every sample whether the core is this thread's alone.
    """
    with no_collections():
        paired = clock(reference)
        samplers = {key: clock(call) for key, call in calls.items()}
        series = {key: Series(sampler.repeats) for key, sampler in samplers.items()}
        order = random.Random(0)
        begin = time.perf_counter()
        for number in range(max_rounds):
            elapsed = time.perf_counter() - begin
            if number >= min_rounds and elapsed > seconds:
                break
            due = [key for key, found in series.items() if not found.exceeds_share(elapsed)]
            before, was_undivided = paired.take().work, is_undivided()
            for key in order.sample(due, len(due)):
                spent, stays_undivided = samplers[key].take(), is_undivided()
                after = paired.take().work
                series[key].add(spent, (before + after) / 2, was_undivided and stays_undivided)
                before, was_undivided = after, is_undivided()
    for found in series.values():
        found.leave_out_divided()
    return series


class OwnCore:
    """Tells whether a core is this thread's alone: a busy thread beside it takes half of the vector ports.

    Args:
        share: Time of a loop that the ports bound over that of one that only waits for itself; 0 if not known.
    """

    def __init__(self, share: Callable[[], float]) -> None:
        self._share = share
        self._alone = min(share() for _ in range(OWN_CORE_PROBES))

    def __call__(self) -> bool:
        """Returns whether it is now."""
        self._alone = min(self._alone, found := self._share())
        return found <= SHARED_CORE * self._alone


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the 20th percentile, the median and the 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[math.floor(0.2 * last)], statistics.median(ordered), ordered[math.ceil(0.8 * last)]


def _nanoseconds(call: Call, repeats: int) -> float:
    """Time of one call, by the host's clock."""
    begin = time.perf_counter_ns()
    for _ in repeat(None, repeats):
        call()
    return (time.perf_counter_ns() - begin) / repeats


def _repeats(cost: float) -> int:
    return max(1, math.ceil(SAMPLE_NS / max(cost, 1.0)))


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
