"""The data of a report: overflow reports by step and rank, and traces, recognised by their contents."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hallo_numguard.core import frames
from hallo_numguard.core.documents import InvalidDocument
from hallo_numguard.core.environment import hides_nan
from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.frames import Frames
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord

_RANK = re.compile(r"rank(\d+)")


class UnreadableFile(NumGuardError):
    """A file that is neither a report nor a trace, or that cannot be read; its text names file and cause."""


@dataclass(frozen=True)
class RankReport:
    """One rank's report of a step.

    Attributes:
        source: Name of the file.
        rank: Global rank that wrote it; None if neither the report nor the file's name has it.
        report: The report. Equal on all ranks of a step, except for history and environment.
    """

    source: str
    rank: int | None
    report: OverflowReport

    @property
    def label(self) -> str:
        """Name of the rank in a display."""
        return self.source if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Overflow:
    """All files on one step's overflow: a report of every rank that wrote one, by rank."""

    ranks: tuple[RankReport, ...]

    @property
    def report(self) -> OverflowReport:
        """Report of the lowest rank."""
        return self.ranks[0].report

    def hides_nan(self) -> list[str]:
        """Returns sentences on libraries that kept NaN out of the logs on any rank."""
        return list(dict.fromkeys(text for item in self.ranks for text in hides_nan(item.report.environment)))


@dataclass(frozen=True)
class NamedTrace:
    """A trace.

    Attributes:
        source: Name of the file.
        trace: The trace.
    """

    source: str
    trace: Frames


@dataclass(frozen=True)
class RankHistory:
    """The steps that one rank recorded, from all its reports.

    Attributes:
        label: Name of the rank in a display.
        steps: Each step once, oldest first.
    """

    label: str
    steps: tuple[StepRecord, ...]

    def series(self) -> Iterator[tuple[str, list[float | None]]]:
        """Yields name and values of each figure: None if unknown, NaN if not finite."""
        yield "loss", [step.loss for step in self.steps]
        yield "loss scale", [step.loss_scale for step in self.steps]
        yield "norm", [math.nan if step.nonfinite else step.norm for step in self.steps]
        yield "absmax", [math.nan if step.nonfinite else step.absmax for step in self.steps]


@dataclass(frozen=True)
class ReportInputs:
    """The data of a report.

    Attributes:
        overflows: Overflows, by step.
        traces: Traces, in the order of their files.
    """

    overflows: tuple[Overflow, ...]
    traces: tuple[NamedTrace, ...]

    def histories(self) -> list[RankHistory]:
        """Returns the history of every rank. Where reports overlap, the later record of a step counts."""
        ranks: dict[str, dict[int, StepRecord]] = {}
        for overflow in self.overflows:
            for item in overflow.ranks:
                ranks.setdefault(item.label, {}).update((step.step, step) for step in item.report.history)
        return [
            RankHistory(label, tuple(steps[number] for number in sorted(steps)))
            for label, steps in ranks.items()
            if steps
        ]


def read(paths: Iterable[Path]) -> ReportInputs:
    """Reads overflow reports and traces.

    Raises:
        UnreadableFile: At the first file that cannot be read or is neither.
    """
    reports: list[RankReport] = []
    traces: list[NamedTrace] = []
    for path in paths:
        value = _read(path)
        if isinstance(value, Frames):
            traces.append(NamedTrace(path.name, value))
        else:
            reports.append(RankReport(path.name, _rank(path, value), value))
    return ReportInputs(_by_step(reports), tuple(traces))


def _read(path: Path) -> OverflowReport | Frames:
    try:
        data = path.read_bytes()
        return frames.read(data) if frames.is_trace(data) else OverflowReport.from_json(data.decode())
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read: {error.strerror}") from error
    except InvalidDocument as error:
        raise UnreadableFile(f"{path} is damaged: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path} is neither an overflow report nor a trace: {error}") from error


def _rank(path: Path, report: OverflowReport) -> int | None:
    rank = report.environment.get("rank")
    if isinstance(rank, int):
        return rank
    named = _RANK.search(path.name)
    return None if named is None else int(named[1])


def _by_step(reports: Sequence[RankReport]) -> tuple[Overflow, ...]:
    """Groups reports by run and step. Runs come in the order of their beginnings, those without a name first."""
    steps: dict[tuple[str, int], list[RankReport]] = {}
    for item in sorted(reports, key=lambda item: (*_run_and_step(item), item.rank is None, item.rank or 0)):
        steps.setdefault(_run_and_step(item), []).append(item)
    return tuple(Overflow(tuple(items)) for items in steps.values())


def _run_and_step(item: RankReport) -> tuple[str, int]:
    return str(item.report.environment.get("run") or ""), item.report.step
