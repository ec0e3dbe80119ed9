"""Paired timing: a sample stands between two reads of the same memory; noise hits both alike."""

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
from typing import Any

Call = Callable[[], Any]

SAMPLE_NS = 200_000  # a sample repeats its call until it lasts about this long
SLOW = 20  # times the read; beyond, a candidate gets fewer rounds
SLOW_SHARE = 0.5  # of the time, or what its fewest rounds take


@dataclass
class Series:
    """The samples of one candidate.

    Attributes:
        repeats: Calls a sample.
        nanoseconds: Time of one call, a sample.
        fractions: Time of the reads around it over its own time, a sample.
    """

    repeats: int
    nanoseconds: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: What all rounds together may take; the fewest rounds are done in any case.
        fewest, fewest_slow, most: Rounds.
        warm: Whether every sample follows as many untimed calls. Right where the data stays in a
            cache, which the candidate before may have emptied; pointless where it does not.
    """

    seconds: float
    fewest: int
    fewest_slow: int
    most: int
    warm: bool


def time_once(call: Call) -> tuple[Any, float]:
    """Returns the result of one call, and its nanoseconds."""
    begin = time.perf_counter_ns()
    result = call()
    return result, float(time.perf_counter_ns() - begin)


def measure(read: Call, calls: Mapping[str, Call], effort: Effort, costs: Mapping[str, float]) -> dict[str, Series]:
    """Times `calls` in rounds, each in a new order, every sample between two of `read`.

    Args:
        read: Reads the memory that all calls work on.
        calls: By key; each has been called before.
        effort: How long.
        costs: Nanoseconds of one call, roughly, by key.
    """
    with _no_collections():
        read_cost = _refined_cost(read, time_once(read)[1])
        costs = {key: _refined_cost(call, costs[key]) for key, call in calls.items()}
        read_repeats = _repeats(read_cost)
        series = {key: Series(_repeats(cost)) for key, cost in costs.items()}
        order = random.Random(0)
        for keys in _rounds(costs, read_cost, effort):
            order.shuffle(keys)
            before = _sample(read, read_repeats, effort.warm)
            for key in keys:
                spent = _sample(calls[key], series[key].repeats, effort.warm)
                after = _sample(read, read_repeats, effort.warm)
                series[key].nanoseconds.append(spent)
                series[key].fractions.append((before + after) / 2 / spent)
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


def _sample(call: Call, repeats: int, warm: bool) -> float:
    """Nanoseconds of one call."""
    if warm:
        for _ in repeat(None, repeats):
            call()
    begin = time.perf_counter_ns()
    for _ in repeat(None, repeats):
        call()
    return (time.perf_counter_ns() - begin) / repeats


def _refined_cost(call: Call, cost: float) -> float:
    """The cost of a call that is too short to be timed alone, from as many as last a sample."""
    return cost if cost > SAMPLE_NS else _sample(call, _repeats(cost), warm=True)


def _repeats(cost: float) -> int:
    return max(1, math.ceil(SAMPLE_NS / max(cost, 1.0)))


def _rounds(costs: Mapping[str, float], read_cost: float, effort: Effort) -> Iterator[list[str]]:
    """The keys of every round; the slow ones are missing from most, evenly."""
    slow = {key for key, cost in costs.items() if cost > SLOW * read_cost}
    passes = 2 if effort.warm else 1

    def seconds(keys: set[str]) -> float:
        samples = (costs[key] * _repeats(costs[key]) for key in keys)
        reads = len(keys) * read_cost * _repeats(read_cost)
        return passes * (sum(samples) + reads) / 1e9

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
def _no_collections() -> Iterator[None]:
    """Keeps the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
