"""Reports on bad steps: completed with what is known of the run, announced, written down, and acted upon by policy."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hallo_numguard.core import run_description
from hallo_numguard.core.atomic_files import first_free, write_whole
from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import Environment, collect
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard import policy
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import Probes, failures
from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.kept_checkpoints import KeptCheckpoints
from hallo_numguard.guard.report_files import ReportFiles
from hallo_numguard.guard.repro.bundle import Bundle, Bundles
from hallo_numguard.ops.device import device_name
from hallo_numguard.trackers.feed import Feed

_report_numbers = itertools.count()


class Reporter:
    """Makes the reports of one session known.

    Args:
        model: The guarded model.
        ranks: Ranks that take part.
        config: Settings.
        on_overflow: The user's callback.
        probes: Parts of the guard, each contained on its own.
        checkpoints: Checkpoints to go back to.
        bundles: Bundles that reproduce a bad step.
        feed: Trackers.

    Attributes:
        last: The last report; None if there was none.
        reported_at: Serial number of that report among those of this process.
    """

    def __init__(
        self,
        model: GuardedModel,
        ranks: Ranks,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        probes: Probes,
        checkpoints: KeptCheckpoints,
        bundles: Bundles,
        feed: Feed,
    ) -> None:
        self.last: OverflowReport | None = None
        self.reported_at = -1
        self._model = model
        self._ranks = ranks
        self._config = config
        self._on_overflow = on_overflow
        self._probes = probes
        self._checkpoints = checkpoints
        self._bundles = bundles
        self._feed = feed
        self._files = ReportFiles("the report", config.dump_keep)
        self._announcer = policy.Announcer()
        self._steps: deque[int] = deque(maxlen=config.history)  # whose gradients were reported

    def has_reported(self, step: int) -> bool:
        """Whether there was a report on the gradients of that step."""
        return step in self._steps

    def completed(self, report: OverflowReport, history: Sequence[StepRecord]) -> OverflowReport:
        """Returns a report with the steps before it, and with what is known of the run."""
        environment = self._probes.run("environment", self._environment) or {}
        return replace(report, history=tuple(history), environment=environment)

    def _environment(self) -> Environment:
        failed = failures()
        return {
            **collect(self._ranks.rank),
            "run": self._ranks.run_id,
            "time": run_description.utc_now(),
            "name": self._config.name,
            "command": run_description.command_line(),
            "world_size": self._ranks.size,
            **self._model.run_facts,
            "device": device_name(self._model.device),
            **({"guard_failures": failed} if failed else {}),
        }

    def act(
        self, report: OverflowReport, bundle: Bundle | None = None, may_settle: bool = False, in_a_row: int = 0
    ) -> BaseException | None:
        """Makes a report known, and agrees with the other ranks on what follows. All ranks call it.

        Args:
            report: The completed report.
            bundle: What reproduces the step, if that was captured.
            may_settle: Whether a lower loss scale is still to be tried.
            in_a_row: Number of reported steps in a row that were applied all the same.

        Returns:
            Exception to raise once the step is dropped; None to go on.
        """
        self._set_last(report)
        self._steps.append(report.step)
        self._checkpoints.step_is_unclean = report.recoverable is not True
        answer = policy.agree(
            report,
            self._config.policy,
            self._on_overflow,
            self._ranks,
            self._model.device,
            self._probes.run("checkpoint keeper", lambda: self._checkpoints.can_go_back) is True,
            self._announcer,
            may_settle,
            in_a_row,
        )
        self._checkpoints.to_undo = report if answer.goes_back else None
        self._probes.run("report file", self._dump, report)
        if bundle is not None:
            self._probes.run("repro bundle", self._bundles.write, report, bundle)
        self._probes.run("trackers", self._feed.report, report)
        return answer.error

    def tell(self, report: OverflowReport) -> None:
        """Makes a report known that is this rank's alone, so that nothing follows from it."""
        self._checkpoints.step_is_unclean = True
        self._announcer.announce(report, "warn")
        self.keep(report)

    def keep(self, report: OverflowReport) -> None:
        """Makes it the last report, and writes it down, without a word."""
        self._set_last(report)
        self._probes.run("report file", self._dump, report)

    def _set_last(self, report: OverflowReport) -> None:
        self.last, self.reported_at = report, next(_report_numbers)

    def _dump(self, report: OverflowReport) -> None:
        """Writes the report into the user's folder."""
        rank, first = self._ranks.rank, report.first
        if self._config.dump_dir is None or (rank != 0 and (first is None or first.rank != rank)):
            return
        folder = Path(self._config.dump_dir)

        def write() -> Path:
            name = f"overflow-step{report.step:08d}-rank{rank}-{self._ranks.run_id}"
            path = first_free(folder / name, ".json")
            write_whole(path, report.to_json().encode())
            return path

        self._files.write(report.verdict.value, write)
