"""The guard of one model, of no framework: what was seen in a step, what it means, and what is to be done about it.

An integration says when (`before_step`, `overflow`, `after_step`), gives the gradients and the loss scaling, and
carries out what comes back. Nothing here knows where gradients come from or how a step is skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.environment import collect
from hallo_numguard.core.errors import CheckpointFailed, NumericsError
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, StepRecord, Verdict
from hallo_numguard.guard import policy
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis.collect import Step, Witness
from hallo_numguard.guard.diagnosis.evidence import Evidence, Replayed
from hallo_numguard.guard.diagnosis.replay import Replayer
from hallo_numguard.guard.diagnosis.rules import judge, needs_replay, settled
from hallo_numguard.guard.guarded_model import Model, Scanned
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.repro.bundle import Bundle, Bundles
from hallo_numguard.guard.step.batch import Batch, Call
from hallo_numguard.guard.step.early_warnings import Watch
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.trackers.base import Sink
from hallo_numguard.trackers.choose import sink_for
from hallo_numguard.trackers.feed import Feed

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")

_FAILED = 2  # graver than any answer
_MOST_FINDINGS = 1000

_OUTLOOK = {
    "parameter": "If the model reads it, the first loss will be NaN, and no loss scale can mend that.",
    "buffer": "If the forward pass reads it, the loss will be NaN.",
    "optimizer_state": "The next step that is applied writes it into the weights.",
}


class Held(NamedTuple):
    """What is known of a step while nobody has waited for whether it was clean.

    Attributes:
        step, scaling, scanned: See `Session.before_step`.
        losses, calls, local: What was seen of it before.
    """

    step: int = 0
    scaling: LossScaling = LossScaling(1.0, dynamic=False)
    scanned: Scanned = Scanned(torch.empty((0, 8), dtype=torch.int64), ())
    losses: Sequence[torch.Tensor] = ()
    calls: Sequence[Call] = ()
    local: Sequence[tuple[torch.Tensor, Piece]] = ()


class Session:
    """Watches the steps of one model on this rank.

    Attributes:
        last_report: On the last step whose gradients were not finite, or None. Replaced by one that is no longer
            provisional when a later step was finite.
        findings: What was noticed that is no overflow, or not yet: see `Finding`. The last 1000.
        failed: Whether our own code failed: the integration takes itself off.
    """

    def __init__(
        self,
        model: Model,
        ranks: Ranks,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.last_report: OverflowReport | None = None
        self.findings: list[Finding] = []
        self.failed = False
        self._model = model
        self._ranks = ranks
        self._config = config
        self._on_overflow = on_overflow
        limit = _near_limit(model.parameters)
        self._recorder = Recorder(config.history, [item.name for item in model.parameters], limit)
        sinks = [*sinks, *map(sink_for, config.sinks)]  # on every rank, so that all refuse what is none
        self._feed = Feed(sinks if ranks.rank == 0 else [])
        self._batch = Batch(model.module)
        self._replayer = (
            Replayer(model.module, model.forward, self._batch, ranks, model.device)
            if model.module is not None and model.forward is not None
            else None
        )
        folder = None if config.repro_dir is None else Path(config.repro_dir)
        self._bundles = Bundles(folder, model.module, self._replayer, ranks, model.device, model.settings)
        self._watch = Watch(model.parameters, self._batch, self._note)
        self._witness = Witness(model, ranks, self._batch, self._recorder, config.local_gradients)
        self._losses: list[torch.Tensor] = []  # of this step's micro-batches, detached
        self._step = 0
        self._scaling = LossScaling(1.0, dynamic=False)
        self._scanned = Scanned(torch.empty((0, 8), dtype=torch.int64), ())
        self._skipped = 0  # steps in a row
        self._unclean = False  # whether this step's gradients were not finite, and not because of the loss scale
        self._to_undo: OverflowReport | None = None
        self._rollbacks = 0
        self._rank_faults: dict[int, int] = {}  # step of the last by rank

    def history(self) -> list[StepRecord]:
        """Returns the flight recorder's steps, oldest first. Waits for rows that are still on their way."""
        return self._recorder.read()

    def stop(self) -> None:
        """Lets go of the model; reports and history stay readable."""
        self.guarded(lambda: self._feed.write(self._recorder.fresh(wait=True), len(self.findings)))
        self._witness.stop()
        self._losses.clear()
        self._batch.clear()

    # -- a step ------------------------------------------------------------------------------------------------------

    def saw_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Takes note of what the model is called with, before it is. Keeps references until the step is over."""
        self._batch.add(args, kwargs)

    def saw_output(self, output: Any) -> None:
        """Takes note of what it returned."""
        self._batch.returned(output)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Takes note of a micro-batch's loss, before its backward."""
        self._losses.append(loss.detach())

    def forget_losses(self) -> None:
        """Forgets those of this step: what was noted were none."""
        self._losses.clear()

    def before_step(self, step: int, scaling: LossScaling, scanned: Scanned) -> None:
        """Takes note of the gradients. No synchronisation."""
        self._step, self._scaling, self._scanned = step, scaling, scanned
        self._unclean = False
        loss = self._losses[-1] if self._losses else None
        self._recorder.begin(step, scaling.scale, scanned.packed, scanned.pieces, loss)
        self._watch.before_step(step, scaling.scale, scanned.packed, scanned.pieces)

    def exchange(self, held: Held) -> Held:
        """Turns to another step, which no `before_step` may be made in between for; returns what is known of this one.

        So a step can be completed, or explained, when the next one's backward pass is over and its own result has
        arrived without anybody waiting for it.
        """
        calls, local = self._batch.exchange(held.calls), self._witness.local.exchange(list(held.local))
        before = Held(self._step, self._scaling, self._scanned, self._losses, calls, local)
        self._step, self._scaling, self._scanned, self._losses = *held[:3], list(held.losses)
        return before

    def after_step(self, applied: bool) -> None:
        """Completes the step."""
        self._recorder.end(applied)
        # A skipped step has been waited for, and may be the last one: what is on its way is worth waiting for as well.
        records = self._recorder.fresh(wait=not applied)
        self._watch.after_step(applied, records)
        self._feed.write(records, len(self.findings))
        self._tell_keeper(applied, records)
        self._losses.clear()
        self._batch.clear()
        self._witness.step_is_over(applied)
        if not applied:
            return
        if self._skipped and self.last_report is not None:
            self.last_report = settled(self.last_report, self._scaling.scale, self._skipped)
            if self._ranks.rank == 0:
                _log.info("step %d is finite again: %s", self._step, self.last_report.advice)
        self._skipped = 0

    # -- an overflow: every rank comes here, and takes part in every reduction -------------------------------------

    def found_inf(self) -> bool:
        """Returns whether any rank's gradients are not finite, the same on all ranks, which must all call it.

        For where the framework does not look itself. Synchronises. A rank whose guard has failed takes part, and then
        `failed` is set on all of them.
        """
        bad = self.guarded(lambda: bool((self._scanned.packed[:, 5] >= 0).any()))
        status = _FAILED if self.failed else int(bad)
        agreed = self._ranks.highest(status, self._model.device)
        self.failed = agreed == _FAILED
        return agreed == 1

    def overflow(self, skipped: bool = True) -> BaseException | None:
        """Finds the origin and sets `last_report`. All ranks must call it in the same step.

        Args:
            skipped: Whether the step is skipped, which it should be.

        Returns:
            What every rank has to raise once the step is dropped, or None to go on. If the guard fails on any rank,
            `failed` is set on all of them.
        """
        self._skipped = self._skipped + 1 if skipped else 0
        losses = self._losses or self.guarded(self._batch.in_place_of_losses) or []
        step = Step(self._step, self._skipped, self._scaling, self._scanned, losses, bool(self._losses))
        local = self.guarded(lambda: self._witness.look(step))
        if self._anyone_failed():
            return None
        agreed = self._witness.agree(step, local)
        evidence = self.guarded(lambda: self._witness.evidence(step, agreed, self.last_report, self._rank_faults))
        if self._anyone_failed():
            return None
        evidence = replace(evidence, replay=self._replay(evidence, losses))
        report = self.guarded(
            lambda: replace(
                judge(evidence), history=tuple(self._recorder.read()), environment=collect(self._ranks.rank)
            )
        )
        if self._anyone_failed():
            return None
        self._witness.reported(local)
        self.last_report = report
        if report.verdict is Verdict.RANK_FAULT and report.first is not None and report.first.rank is not None:
            self._rank_faults[report.first.rank] = report.step
        bundle = self._take_bundle(report, evidence)
        self._unclean = report.recoverable is not True
        answer = policy.agree(
            report, self._config.policy, self._on_overflow, self._ranks, self._model.device, self._can_go_back
        )
        self._to_undo = report if answer.goes_back else None
        self._dump(report)
        if bundle is not None:
            self._bundles.write(report, bundle)
        self._feed.report(report)
        return answer.error

    @property
    def _can_go_back(self) -> bool:
        is_able = self._config.keeper is not None and self._model.can_go_back()
        return is_able and self._rollbacks < self._config.policy.max_rollbacks

    @property
    def keeps_scale(self) -> bool:
        """Whether lowering the scale would be a loss without a gain: what is not finite stands before the scaling."""
        report = self.last_report
        return (
            self._config.policy.keep_scale
            and report is not None
            and report.first is not None
            and report.first.kind not in ("gradient", "reduction")
        )

    @property
    def goes_back(self) -> bool:
        """Whether all ranks have agreed to go back to a checkpoint, and have not yet."""
        return self._to_undo is not None

    def go_back(self, run: Any) -> None:
        """Puts a run back to its last healthy checkpoint, if that was agreed: all ranks call it after every step.

        Raises:
            NumericsError: On all of them, if there is no such checkpoint, or it cannot be loaded.
        """
        report, self._to_undo = self._to_undo, None
        if report is None:
            return
        self._rollbacks += 1
        try:
            checkpoint = self._config.keeper.rollback(run)
        except CheckpointFailed as error:
            if self._ranks.rank == 0:
                _log.error("step %d cannot be undone: %s", report.step, error)
            raise NumericsError(report) from error
        self._skipped = 0
        if self._ranks.rank == 0:
            allowed = self._config.policy.max_rollbacks
            _log.warning("went back to checkpoint %s: rollback %d of %d", checkpoint, self._rollbacks, allowed)

    def _tell_keeper(self, applied: bool, records: Sequence[StepRecord]) -> None:
        keeper, last = self._config.keeper, records[-1] if records else None
        if keeper is None:
            return
        loss = None if last is None else last.loss
        if self._unclean or (loss is not None and not math.isfinite(loss)):
            keeper.bad_step()
        elif applied:
            keeper.clean_step(last)

    def _take_bundle(self, report: OverflowReport, evidence: Evidence) -> Bundle | None:
        replay = evidence.replay
        micro_batch, number = (evidence.micro_batch, 0) if replay is None else (replay.micro_batch, replay.number)
        self._witness.local.muted = True
        try:
            return self._bundles.take(report, micro_batch, number)
        finally:
            self._witness.local.muted = False

    def _dump(self, report: OverflowReport) -> None:
        """Writes the report where the user wants it. A full disk is no reason to stop training."""
        rank, first = self._ranks.rank, report.first
        if self._config.dump_dir is None or (rank != 0 and (first is None or first.rank != rank)):
            return
        path = Path(self._config.dump_dir) / f"overflow-step{report.step:08d}-rank{rank}.json"
        try:
            write_whole(path, report.to_json().encode())
        except OSError as error:
            _log.error("the report could not be written: %s", error)

    def _replay(self, evidence: Evidence, losses: Sequence[torch.Tensor]) -> Replayed | None:
        """Runs the batch again where that can tell more; the same on every rank, which all see the same evidence."""
        if self._replayer is None or not evidence.loss_known or not needs_replay(evidence):
            return None
        if evidence.loss is None and not self._model.backward_again:
            return Replayed("the gradients of sharded parameters cannot be asked for by name")
        self._witness.local.muted = True
        try:
            if evidence.loss is not None:
                found = self._replayer.of_a_bad_loss([bool(torch.isfinite(loss)) for loss in losses])
            else:
                found = self._replayer.of_bad_gradients(evidence.scaling.scale)
        finally:
            self._witness.local.muted = False
        return replace(found, origin=found.origin and self._witness.by_its_first_name(found.origin))

    # -- weights outside of a step -----------------------------------------------------------------------------------

    def inspect_weights(self, when: str) -> None:
        """Looks at what this rank has of parameters, buffers and optimizer state, and tells what is not finite."""
        for offender, mine in self._witness.inspect():
            self._tell(offender, when, mine)

    def _tell(self, offender: Offender, when: str, mine: bool) -> None:
        message = f"{offender}, seen when {when}. {_OUTLOOK[offender.kind]}"
        self._note(Finding("nonfinite", message, name=offender.name, offender=offender), mine)

    def _note(self, finding: Finding, mine: bool | None = None) -> None:
        self.findings.append(finding)
        del self.findings[:-_MOST_FINDINGS]
        loud = self._ranks.rank == 0 if mine is None else mine
        _log.log(logging.WARNING if loud else logging.INFO, "%s", finding)

    # -- the guard's own failures --------------------------------------------------------------------------------------

    def guarded(self, work: Callable[[], T]) -> T | Any:
        """Runs `work`; a failure of ours is logged once and never stops training."""
        if self.failed:
            return None
        try:
            return work()
        except Exception:  # noqa: BLE001 - whatever it is, training goes on
            self.failed = True
            _log.exception("hallo_numguard failed and will take itself off; training goes on")
            return None

    def _anyone_failed(self) -> bool:
        """Agrees whether all ranks are still well."""
        self.failed = self._ranks.highest(int(self.failed), self._model.device) > 0
        return self.failed


def _near_limit(parameters: Sequence[NamedTensor]) -> float | None:
    """The largest number that gradients can hold, where training comes near it."""
    halves = (item.tensor.dtype is torch.float16 and item.tensor.requires_grad for item in parameters)
    return float(torch.finfo(torch.float16).max) if any(halves) else None
