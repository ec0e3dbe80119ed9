"""Weights that an update of the optimizer, or code beside it, was seen to make non-finite."""

from __future__ import annotations

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis import update_messages
from hallo_numguard.guard.diagnosis.collect import EvidenceCollector
from hallo_numguard.guard.diagnosis.weight_history import WeightHistory, history_of
from hallo_numguard.guard.finding_log import FindingLog
from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.named_tensors import scan_tensors, stats_as_seen
from hallo_numguard.guard.reporter import Reporter
from hallo_numguard.guard.step.pending import StepOwner
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.guard.step.updates import UpdateWatch, WrittenWeight


class UpdateChecks:
    """Reports what the looks at the weights around an update have shown.

    Args:
        model: The guarded model.
        ranks: Ranks that take part.
        steps: The step under way.
        updates: Looks at the weights around each update.
        collector: Evidence of a bad step.
        recorder: Figures of the steps.
        reporter: Makes reports known.
        log: Keeps findings.
    """

    def __init__(
        self,
        model: GuardedModel,
        ranks: Ranks,
        steps: StepOwner,
        updates: UpdateWatch,
        collector: EvidenceCollector,
        recorder: Recorder,
        reporter: Reporter,
        log: FindingLog,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._steps = steps
        self._updates = updates
        self._collector = collector
        self._recorder = recorder
        self._reporter = reporter
        self._log = log
        self._written: list[WrittenWeight] = []  # by the update of this step

    def after_update(self) -> bool:
        """Takes what was seen of the update that was just made. Returns whether it made weights non-finite.

        Tells of weights that it made absurdly large, though finite: the next forward pass will overflow.
        """
        self._written = self._updates.news()
        for growth in self._updates.growths():
            item = self._model.parameters[growth.position]
            message = update_messages.growth_text(growth, item, self._model.optimizer)
            self._log.note(Finding("update_ratio", message, growth.step, item.name))
        return bool(self._written)

    def report(self) -> BaseException | None:
        """Reports weights that the update of the last step was seen to make non-finite.

        A rank that has others to agree with only notes it: their next step, whose loss is not finite, brings them
        together.

        Returns:
            Exception to raise; None to go on.
        """
        written, self._written = self._written, []
        if not written:
            return None
        self._updates.alarm()
        first = next((item for item in written if item.by_update), written[0])
        item = self._model.parameters[first.position]
        history = history_of(first, item, self._updates, self._model.optimizer)
        if self._collector.history_with_bad_moment([other.position for other in written]) is not None:
            return None  # bad before this update: the next step, whose loss is not finite, is judged with all evidence
        if not history.is_by_update:
            self._note_other_writer(first, history)
            return None
        names = [self._model.parameters[other.position].name for other in written if other.by_update]
        return self._report_update(first, history, names)

    def _note_other_writer(self, first: WrittenWeight, history: WeightHistory) -> None:
        item, number = self._model.parameters[first.position], first.before_update or first.by_update
        offender, is_over = self._offender(first)
        since = ", and finite again after its update" if is_over else ""
        message = f"{offender}, seen at step {number}{since}. {'; '.join(update_messages.other_lines(history))}"
        self._log.note(Finding("nonfinite", message, number, item.name, offender), is_mine=True)

    def _offender(self, written: WrittenWeight) -> tuple[Offender, bool]:
        """The weight as it is now; or as it was seen, and True, if it has been overwritten since."""
        item = self._model.parameters[written.position]
        stats = scan_tensors([item])
        is_over = not stats.bad_positions()
        if is_over:
            *counts, first = written.seen
            stats = stats_as_seen(item, counts, first)
        return item.offender(stats, 0, self._ranks.rank), is_over

    def _report_update(self, first: WrittenWeight, history: WeightHistory, names: list[str]) -> BaseException | None:
        item = self._model.parameters[first.position]
        offender, _ = self._offender(first)
        report = update_messages.report_on_update(
            history,
            offender,
            self._collector.state_offender(first.position),
            names,
            self._updates.total,
            self._steps.pending.scaling.scale,
            self._ranks.size,
        )
        if self._ranks.size == 1:
            return self._reporter.act(self._reporter.completed(report, self._recorder.read()))
        message = f"{report.happened} {report.advice}"
        finding = Finding("update_nonfinite", message, report.step, item.name, offender, severity="error")
        self._log.note(finding, is_mine=True)
        return None
