"""Weights, buffers and optimizer state outside of a step: when they are attached, loaded or saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from hallo_numguard.core.config import Policy
from hallo_numguard.core.errors import NumericsError
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import Probes
from hallo_numguard.guard.diagnosis import update_messages
from hallo_numguard.guard.diagnosis.collect import EvidenceCollector
from hallo_numguard.guard.finding_log import FindingLog
from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.module_groups import by_module
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.reporter import Reporter
from hallo_numguard.guard.save_gate import Save, SaveCheck, SaveGate, is_mask, report_on
from hallo_numguard.guard.step.pending import StepOwner
from hallo_numguard.guard.step.recorder import Recorder

_log = logging.getLogger("hallo_numguard")

MAX_ALONE = 3  # tensors of one module that get a finding each

_OUTLOOK = {
    "parameter": "If the model reads it, the first loss will be NaN, and no loss scale can mend that.",
    "buffer": "If the forward pass reads it, the loss will be NaN.",
    "optimizer_state": "The next step that is applied writes it into the weights.",
}
_PLURAL = {"parameter": "parameters", "buffer": "buffers", "optimizer_state": "states of the optimizer"}


class WeightChecks:
    """Reads what a run is attached to or loads, and what it is about to save.

    Args:
        model: The guarded model.
        ranks: Ranks that take part.
        policy: What follows from a report.
        steps: The step under way.
        collector: Reads the tensors of this rank.
        recorder: Figures of the steps.
        reporter: Makes reports known.
        log: Keeps findings.
        probes: Parts of the guard, each contained on its own.

    Attributes:
        save_gate: Check before the run is saved.
    """

    def __init__(
        self,
        model: GuardedModel,
        ranks: Ranks,
        policy: Policy,
        steps: StepOwner,
        collector: EvidenceCollector,
        recorder: Recorder,
        reporter: Reporter,
        log: FindingLog,
        probes: Probes,
    ) -> None:
        self.save_gate = SaveGate(model, ranks, probes)
        self._model = model
        self._ranks = ranks
        self._policy = policy
        self._steps = steps
        self._collector = collector
        self._recorder = recorder
        self._reporter = reporter
        self._log = log
        self._probes = probes

    def inspect(self, when: str) -> None:
        """Reads this rank's parameters, buffers and optimizer state, and reports what is not finite.

        Args:
            when: When that is, as in "attached".
        """
        self._model.note_unchecked()
        found = list(self._collector.inspect(when))
        for finding, is_mine in _findings(found, when, self._collector.weights):
            self._log.note(finding, is_mine)
        for name, absmax in self._collector.absurd_parameters():
            message = f"{name} holds numbers of up to {absmax:.4g}, seen when {when}: products with them overflow"
            self._log.note(Finding("absurd_weight", message, name=name))
        self.note_unchecked()
        self.save_gate.remember(when, [offender for offender, _ in found])

    def note_unchecked(self) -> None:
        """Notes tensors that were left out since this was last called."""
        finding = self._model.unchecked.finding()
        if finding is not None:
            self._log.note(finding)

    def check_save(self, save: Save, is_on_guard: bool) -> NumericsError | None:
        """Reads what is about to be saved. All ranks call it if they make that save together; see `Save`.

        Args:
            save: The save.
            is_on_guard: Whether this rank's guard is still attached.

        Returns:
            Error to raise in place of the save; None to go on with it.
        """
        check = self.save_gate.check(save, self._reporter.last, is_on_guard)
        for offender in check.legal:
            if is_mask(offender):
                _log.info("%s writes %s: -Inf alone, as in a mask", save.name, offender)
            else:
                self._log.note(self.save_gate.finding(save, offender), self._ranks.rank == 0)
        if not check.is_bad:
            return None
        report = self._report_on(check, save)
        if self._policy.on_bad_save == "warn":
            finding = Finding("nonfinite", report.happened, offender=report.first, severity="error")
            self._log.note(finding, is_mine=True)
            return None
        last = self._reporter.last
        if last is None or report != replace(last, happened=report.happened):
            report = self._reporter.completed(report, self._probes.run("flight recorder", self._recorder.read) or ())
            self._reporter.keep(report)
        return NumericsError(report)

    def _report_on(self, check: SaveCheck, save: Save) -> OverflowReport:
        pending, last = self._steps.pending, self._reporter.last
        report = report_on(check, save, last, pending.number, pending.scaling.scale, self._ranks.size)
        return self._probes.run("look at the updates", self._blamed, report) or report

    def _blamed(self, report: OverflowReport) -> OverflowReport:
        """The report, once it is known that an update wrote what is about to be saved."""
        names = {item.name: at for at, item in enumerate(self._model.parameters)}
        position = None if report.first is None else names.get(report.first.name)
        if position is None or report.verdict is Verdict.UPDATE_NONFINITE:
            return report
        history = self._collector.history(position)
        if history is None or not history.is_by_update:
            return report
        return update_messages.blamed_on_update(report, history)


def _findings(
    found: Sequence[tuple[Offender, bool]], when: str, weights: Iterable[NamedTensor]
) -> Iterator[tuple[Finding, bool]]:
    """Returns a finding for each tensor, or for each module that has more than three, and whose it is to log.

    Args:
        found: Tensors that are not finite, and whether this rank is to log each.
        when: When they were seen, as in "attached".
        weights: All tensors that were read.
    """
    known = [(item.kind, item.name) for item in weights]
    for kind, is_mine in dict.fromkeys((offender.kind, is_mine) for offender, is_mine in found):
        offenders = {item.name: item for item, mine in found if (item.kind, mine) == (kind, is_mine)}
        all_names = [name for known_kind, name in known if (known_kind == "buffer") is (kind == "buffer")]
        for module, names in by_module(list(offenders), all_names).items():
            yield from ((finding, is_mine) for finding in _of_module(module, [offenders[at] for at in names], when))


def _of_module(module: str, offenders: Sequence[Offender], when: str) -> Iterator[Finding]:
    first = offenders[0]
    if len(offenders) > MAX_ALONE:
        what = f"{len(offenders)} {_PLURAL[first.kind]} of {module or 'the model'} are not finite, the first is {first}"
        yield Finding("nonfinite", f"{what}, seen when {when}. {_OUTLOOK[first.kind]}", name=module, offender=first)
        return
    for offender in offenders:
        message = f"{offender}, seen when {when}. {_OUTLOOK[offender.kind]}"
        yield Finding("nonfinite", message, name=offender.name, offender=offender)
