"""Files that a report is made of: overflow reports and traces, told apart by what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hallo_numguard.core import frames
from hallo_numguard.core.declared import is_as_declared
from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.frames import Frames
from hallo_numguard.core.overflow_report import OverflowReport

_GZIP = b"\x1f\x8b"
_TRACE = re.compile(rb'\s*\{[^\n]*"kind":\s*"trace"')
_HEADER = 4096  # bytes within which a trace says that it is one
_RANK = re.compile(r"rank(\d+)")


class UnreadableFile(NumGuardError):
    """A file that is neither a report nor a trace, or that cannot be read; its text names file and cause."""


@dataclass(frozen=True)
class RankReport:
    """One rank's report of a step.

    Attributes:
        source: Name of the file.
        rank: That wrote it; None if neither the report nor the file's name tells.
        report: What it says. The ranks of a step agree on it; the history and the environment are each rank's own.
    """

    source: str
    rank: int | None
    report: OverflowReport

    @property
    def label(self) -> str:
        """What the rank is called in a display."""
        return self.source if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Overflow:
    """All that was given of one step's overflow: a report of every rank that wrote one, by rank."""

    ranks: tuple[RankReport, ...]

    @property
    def report(self) -> OverflowReport:
        """The lowest rank's."""
        return self.ranks[0].report


@dataclass(frozen=True)
class NamedTrace:
    """A trace, and the name of its file."""

    source: str
    trace: Frames


@dataclass(frozen=True)
class Material:
    """What is to be shown.

    Attributes:
        overflows: By step.
        traces: In the order in which they were given.
    """

    overflows: tuple[Overflow, ...]
    traces: tuple[NamedTrace, ...]


def read(paths: Iterable[Path]) -> Material:
    """Reads files of either kind.

    Raises:
        UnreadableFile: At the first that cannot be read or is of neither kind.
    """
    reports: list[RankReport] = []
    traces: list[NamedTrace] = []
    for path in paths:
        value = _read(path)
        if isinstance(value, Frames):
            traces.append(NamedTrace(path.name, value))
        else:
            reports.append(RankReport(path.name, _rank(path, value), value))
    return Material(_by_step(reports), tuple(traces))


def _read(path: Path) -> OverflowReport | Frames:
    try:
        data = path.read_bytes()
        value = frames.load(path) if _is_trace(data) else OverflowReport.from_json(data.decode())
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise UnreadableFile(f"{path} is neither an overflow report nor a trace: {error}") from error
    if not is_as_declared(value, type(value)):
        raise UnreadableFile(f"{path} is damaged: it holds values of other types than the format has")
    return value


def _is_trace(data: bytes) -> bool:
    return data.startswith(_GZIP) or _TRACE.match(data[:_HEADER]) is not None


def _rank(path: Path, report: OverflowReport) -> int | None:
    rank = report.environment.get("rank")
    if isinstance(rank, int):
        return rank
    named = _RANK.search(path.name)
    return None if named is None else int(named[1])


def _by_step(reports: Sequence[RankReport]) -> tuple[Overflow, ...]:
    steps: dict[int, list[RankReport]] = {}
    for item in sorted(reports, key=lambda item: (item.report.step, item.rank is None, item.rank or 0)):
        steps.setdefault(item.report.step, []).append(item)
    return tuple(Overflow(tuple(items)) for items in steps.values())
