"""Counts what the guards of many ranks send to one another, in a clean step and in one with a bad gradient.

    python tools/many_ranks.py [--ranks 1000] [--late SECONDS | --dead]

Each rank is a thread with the guard's own session, meetings and reductions; only the process group and its store are
stood in for, by ones that count. The last rank's part of a gradient holds a NaN. A reduction of n ranks counts as
2 (n - 1) messages in 2 log2 n rounds, as in a binary tree; a request to the store as one message.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import click
import torch

from hallo_numguard.core.config import GuardConfig
from hallo_numguard.guard import collectives, rendezvous
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.loss_scaling import UNSCALED
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.session import Session
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.table import StatsTable

ELEMENTS = 4  # of a gradient that each rank holds
STACK_BYTES = 1 << 20
WAIT_SECONDS = 2.0  # for a rank that does not come


@dataclass
class Traffic:
    """What was sent.

    Attributes:
        reductions: Number of reductions.
        reduced_bytes: Bytes that each rank has given to them.
        requests: Requests to the store, of all ranks.
        request_bytes: Bytes of keys and values in these.
    """

    reductions: int = 0
    reduced_bytes: int = 0
    requests: int = 0
    request_bytes: int = 0

    def messages(self, ranks: int) -> int:
        """Returns the number of messages."""
        return self.reductions * 2 * (ranks - 1) + self.requests

    def rounds(self, ranks: int) -> int:
        """Returns the number of messages that follow one another in the reductions."""
        return self.reductions * 2 * math.ceil(math.log2(ranks))


@dataclass
class _Reduction:
    total: torch.Tensor | None = None
    arrived: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Job:
    """A process group and a store whose ranks are threads."""

    ReduceOp = torch.distributed.ReduceOp
    group = SimpleNamespace(WORLD=None)

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._reductions: dict[int, _Reduction] = {}
        self._met = [0] * ranks  # reductions that each rank has entered
        self._this = threading.local()
        options = SimpleNamespace(_timeout=datetime.timedelta(seconds=2 * WAIT_SECONDS))
        backend = SimpleNamespace(options=options)
        self.group = SimpleNamespace(WORLD=SimpleNamespace(_device_types=["cpu"], _get_backend=lambda _: backend))
        self.distributed_c10d = SimpleNamespace(_get_default_store=lambda: self)

    def become(self, rank: int) -> None:
        """Makes the calling thread a rank."""
        self._this.rank = rank

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes the place of torch.distributed in the guard's meetings and reductions."""
        modules: Sequence[Any] = (collectives, rendezvous)
        before = [module.dist for module in modules]
        for module in modules:
            module.dist = self
        try:
            yield
        finally:
            for module, dist in zip(modules, before, strict=True):
                module.dist = dist

    # -- torch.distributed -------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        """It is."""
        return True

    is_initialized = is_available

    def get_rank(self, group: Any = None) -> int:
        """Returns the rank of the calling thread."""
        return int(self._this.rank)

    def get_world_size(self, group: Any = None) -> int:
        """Returns the number of ranks."""
        return self.ranks

    def get_process_group_ranks(self, group: Any) -> list[int]:
        """Returns all ranks."""
        return list(range(self.ranks))

    def all_reduce(self, tensor: torch.Tensor, op: Any, group: Any = None, async_op: bool = False) -> Any:
        """Reduces over all ranks; a rank that does not come is an error after the group's timeout."""
        number = self._met[self.get_rank()]
        self._met[self.get_rank()] += 1
        with self._lock:
            reduction = self._reductions.setdefault(number, _Reduction())
            self._add(reduction, tensor, op)
        work = _Work(reduction, tensor)
        if not async_op:
            work.wait()
        return work

    def _add(self, reduction: _Reduction, tensor: torch.Tensor, op: Any) -> None:
        if reduction.total is None:
            reduction.total = tensor.clone()
            self.traffic.reductions += 1
            self.traffic.reduced_bytes += tensor.nbytes
        elif op == self.ReduceOp.SUM:
            reduction.total += tensor
        else:
            choose = torch.minimum if op == self.ReduceOp.MIN else torch.maximum
            reduction.total = choose(reduction.total, tensor)
        reduction.arrived += 1
        if reduction.arrived == self.ranks:
            reduction.done.set()

    # -- the store ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _request(self, *parts: str) -> Iterator[dict[str, bytes]]:
        with self._lock:
            self.traffic.requests += 1
            self.traffic.request_bytes += sum(map(len, parts))
            yield self._values

    def add(self, key: str, amount: int) -> int:
        """Adds to a number, from 0."""
        with self._request(key) as values:
            number = int(values.get(key, b"0")) + amount
            values[key] = str(number).encode()
            return number

    def set(self, key: str, value: str) -> None:
        """Sets a value."""
        with self._request(key, value) as values:
            values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """Returns a value that is there."""
        with self._request(key) as values:
            return values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Returns whether all keys are there."""
        with self._request(*keys) as values:
            return all(key in values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets a value that is as expected; returns it as it is then."""
        with self._request(key, expected, desired) as values:
            if values.get(key, b"") == expected.encode():
                values[key] = desired.encode()
            return values[key]


@dataclass
class _Work:
    """A reduction under way."""

    reduction: _Reduction
    tensor: torch.Tensor

    def is_completed(self) -> bool:
        """Returns whether all ranks have come."""
        return self.reduction.done.is_set()

    def wait(self) -> None:
        """Waits for the other ranks."""
        if not self.reduction.done.wait(2 * WAIT_SECONDS):
            raise RuntimeError("a rank has not come to a reduction")
        if self.reduction.total is not None:
            self.tensor.copy_(self.reduction.total)


@dataclass
class Result:
    """What a step has taken.

    Attributes:
        clean: Traffic of a clean step.
        bad: Traffic of the step with a bad gradient.
        seconds: Time of that step.
        verdicts: Verdict of each rank's report; "" where it has none.
        alone: Number of ranks that have judged by themselves.
        norms: Norm of the whole gradient in the clean step, as each rank has recorded it.
    """

    clean: Traffic
    bad: Traffic
    seconds: float
    verdicts: list[str]
    alone: int
    norms: list[float]


def simulate(ranks: int, late: float = 0.0, is_dead: bool = False) -> Result:
    """Makes a clean step and a bad one.

    Args:
        ranks: Number of ranks.
        late: Time by which the first rank comes later to the diagnosis, in seconds.
        is_dead: Whether it never comes.
    """
    job = Job(ranks)
    with job.installed():
        sessions = [_session(job, rank) for rank in range(ranks)]
        _on_all(job, lambda rank: _clean_step(sessions[rank]))
        clean, job.traffic = job.traffic, Traffic()
        began = time.perf_counter()
        _on_all(job, lambda rank: _bad_step(sessions[rank], rank, late, is_dead))
        seconds = time.perf_counter() - began
        reports = [session.last_report for session in sessions]
        alone = sum(report is not None and "by itself" in str(report) for report in reports)
        norms = [session.history()[0].norm for session in sessions]
    verdicts = [report.verdict if report else "" for report in reports]
    return Result(clean, job.traffic, seconds, verdicts, alone, norms)


def _session(job: Job, rank: int) -> Session:
    job.become(rank)
    rendezvous._instances.clear()  # every rank has the first one, as in a process of its own
    parameter = torch.nn.Parameter(torch.zeros(job.ranks * ELEMENTS))
    model = GuardedModel(
        [NamedTensor("parameter", "weight", parameter)],
        [],
        sliced_gradients=True,
        scan_state=lambda: ScannedPieces(StatsTable.empty(), ()),
        sliced_state=True,
        device=torch.device("cpu"),
        exchanges_figures=True,
    )
    return Session(model, Ranks(), GuardConfig(), None)


def _gradients(rank: int, value: float) -> ScannedPieces:
    part = torch.full((ELEMENTS,), 1.0)
    part[1] = value
    return ScannedPieces(multi_tensor_stats([part]), [Piece(0, rank * ELEMENTS)])


def _clean_step(session: Session) -> None:
    session.before_step(1, UNSCALED, _gradients(session._ranks.rank, 2.0))
    session.after_step(applied=True)


def _bad_step(session: Session, rank: int, late: float, is_dead: bool) -> None:
    is_last = rank == session._ranks.size - 1
    session.before_step(2, UNSCALED, _gradients(rank, math.nan if is_last else 2.0))
    if rank == 0 and is_dead:
        return
    if rank == 0:
        time.sleep(late)
    session.overflow(2)


def _on_all(job: Job, work: Callable[[int], None]) -> None:
    def run(rank: int) -> None:
        job.become(rank)
        work(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(job.ranks)]
    before = threading.stack_size(STACK_BYTES)
    for thread in threads:
        thread.start()
    threading.stack_size(before)
    for thread in threads:
        thread.join()


@click.command()
@click.option("--ranks", type=click.IntRange(min=2), default=1000, show_default=True, help="Number of ranks.")
@click.option("--late", type=float, default=0.0, help="Seconds by which the first rank comes later.")
@click.option("--dead", is_flag=True, help="The first rank never comes to the diagnosis.")
def main(ranks: int, late: float, dead: bool) -> None:
    """Count what the guards of many ranks send to one another."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    result = simulate(ranks, late, dead)
    for name, traffic in (("clean step", result.clean), ("bad gradient", result.bad)):
        click.echo(
            f"{name}: {traffic.reductions} reductions of {traffic.reduced_bytes:,} bytes in all, "
            f"{traffic.requests / ranks:.1f} requests to the store per rank of "
            f"{traffic.request_bytes / max(1, traffic.requests):.0f} bytes; {traffic.messages(ranks):,} messages, "
            f"{traffic.rounds(ranks):,} rounds"
        )
    verdicts = {verdict: result.verdicts.count(verdict) for verdict in dict.fromkeys(result.verdicts)}
    click.echo(f"{verdicts}, {result.alone} ranks by themselves, {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
