"""Steps whose loss is not finite though their gradients are, and gradients that nobody clears."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from hallo_numguard.core.config import Policy
from hallo_numguard.core.errors import NumericsError
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis.evidence import Replayed
from hallo_numguard.guard.diagnosis.loss_messages import BadLoss, loss_report, short_line, uncleared_line
from hallo_numguard.guard.diagnosis.nonfinite_losses import in_words, look_at, loss_offender
from hallo_numguard.guard.diagnosis.replay import Replayer
from hallo_numguard.guard.finding_log import FindingLog
from hallo_numguard.guard.reporter import Reporter
from hallo_numguard.guard.step.armed import ArmedSteps
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.pending import StepOwner
from hallo_numguard.guard.step.recorder import Recorder

_log = logging.getLogger("hallo_numguard")

MAX_REPLAYS = 10  # of steps in a row that are applied with a bad loss


class LossChecks:
    """Tells of losses that are not finite where no gradient shows it.

    A loss is a rank's own, so that nothing is reduced here, and nothing raised where there are several ranks.

    Args:
        ranks: Ranks that take part.
        policy: What follows from a report.
        steps: The step under way.
        batch: Its calls of the model.
        armed: What was seen of the operations of a step that was watched.
        replayer: Runs passes of the step again; None if that is impossible.
        recorder: Figures of the steps.
        reporter: Makes reports known.
        log: Keeps findings.
    """

    def __init__(
        self,
        ranks: Ranks,
        policy: Policy,
        steps: StepOwner,
        batch: Batch,
        armed: ArmedSteps,
        replayer: Replayer | None,
        recorder: Recorder,
        reporter: Reporter,
        log: FindingLog,
    ) -> None:
        self._ranks = ranks
        self._policy = policy
        self._steps = steps
        self._batch = batch
        self._armed = armed
        self._replayer = replayer
        self._recorder = recorder
        self._reporter = reporter
        self._log = log
        self._in_a_row = 0  # applied steps with a bad loss
        self._replayed: Replayed | None = None  # of the step under way, if its loss is bad and its gradients are not
        # The bad step whose gradients have stayed, and the last step that kept them.
        self._uncleared: tuple[int, int] | None = None
        self._error: BaseException | None = None

    def before_step(self) -> None:
        """Runs the batch of a bad loss again before its step changes the weights, where gradients are finite.

        Only where the loss is there without a wait, on the CPU, or the step before had such a loss; and only by a rank
        that is alone, as a loss is its own.
        """
        self._replayed = None
        pending = self._steps.pending
        if not pending.losses_of_backward or self._ranks.size > 1 or self._replayer is None:
            return
        is_here = self._in_a_row > 0 or all(loss.device.type == "cpu" for loss in pending.losses)
        if not is_here or self._in_a_row >= MAX_REPLAYS:
            return
        finite = [math.isfinite(loss) for loss in pending.losses]
        if not all(finite) and not bool(pending.gradients.table.any_nonfinite()):
            self._replayed = self._replayer.explain_bad_loss(finite)

    def check(self, records: Sequence[StepRecord], may_raise: bool) -> None:
        """Tells of the steps that were applied with a loss that was not finite, though their gradients were.

        Args:
            records: Figures that have become known.
            may_raise: Whether `take_error` is asked afterwards.
        """
        bad = self._recorder.bad_losses
        for row in records:
            if row.applied and row.step in bad and not row.nonfinite:
                self._in_a_row += 1
                self._tell(row, may_raise)
            elif row.applied and row.loss is not None:
                self._in_a_row = 0

    def take_error(self) -> BaseException | None:
        """Returns what is to be raised after a step that was applied, once."""
        error, self._error = self._error, None
        return error

    def _tell(self, row: StepRecord, may_raise: bool) -> None:
        pending, rank, last = self._steps.pending, self._ranks.rank, self._reporter.last
        if pending.number == row.step and pending.losses:
            bad, loss = look_at(pending, self._batch, rank)
            bad = replace(bad, replay=self._replayed, watched=self._armed.source(pending.losses, is_alone=False))
            if bad.source is None:
                self._armed.arm()
        else:
            value = math.nan if row.loss is None or math.isfinite(row.loss) else row.loss
            bad, loss = BadLoss(value=in_words(value)), loss_offender(value, "float64", rank)
        report = loss_report(row, bad, self._in_a_row, loss, self._ranks.size)
        report = self._reporter.completed(report, self._recorder.read())
        line = short_line(row, bad, self._in_a_row)
        finding = Finding("loss_nonfinite", line, row.step, "loss", report.first)
        self._log.note(finding, is_mine=False)  # the report is loud
        if last is not None and last.step > row.step:
            _log.warning("%s", report.headline())
        elif may_raise and self._ranks.size == 1:
            self._error = self._reporter.act(report, in_a_row=self._in_a_row) or self._error
        else:
            self._reporter.tell(report)

    def gradients_were_not_cleared(self, step: int) -> NumericsError | None:
        """Tells that a backward pass adds to gradients that were not finite before, as nobody has cleared them.

        Args:
            step: Number of the step under way.

        Returns:
            Error to raise when the script next calls us; None to go on.
        """
        report = self._reporter.last
        if report is None:
            return None
        if self._uncleared is None or self._uncleared[1] != step - 1:
            self._uncleared = step - 1, step - 1
        since, self._uncleared = self._uncleared[0], (self._uncleared[0], step)
        count = step - since
        self._log.note(Finding("gradients_not_cleared", uncleared_line(step, since, count), step, severity="error"))
        if self._ranks.size > 1:  # each rank counts by itself
            return None
        action = self._policy.action_for(report, in_a_row=count + 1)
        return NumericsError(report) if action == "raise" and report.recoverable is not False else None
