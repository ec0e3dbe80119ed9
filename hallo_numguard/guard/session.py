"""The guard of one model, framework-independent: observes a step, explains an overflow, and chooses the action.

An integration calls it (`before_step`, `overflow`, `after_step`) with the gradients and the loss scaling, and carries
out the action. Where gradients come from, and how a step is skipped, is the integration's part.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.errors import NumericsError
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord, Verdict
from hallo_numguard.core.safe_text import listed
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import Probes, contain_failures
from hallo_numguard.guard.diagnosis import messages
from hallo_numguard.guard.diagnosis.collect import BadStep, EvidenceCollector
from hallo_numguard.guard.diagnosis.evidence import Evidence
from hallo_numguard.guard.diagnosis.replay import Replayer
from hallo_numguard.guard.diagnosis.rules import confirm, is_unexplained, judge
from hallo_numguard.guard.diagnosis.shared_losses import share_losses
from hallo_numguard.guard.feeding_modules import FeedingModules
from hallo_numguard.guard.finding_log import FindingLog
from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.kept_checkpoints import KeptCheckpoints
from hallo_numguard.guard.loss_checks import LossChecks
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.report_files import ReportFiles
from hallo_numguard.guard.reporter import Reporter
from hallo_numguard.guard.repro.bundle import Bundle, Bundles
from hallo_numguard.guard.save_gate import Save, SaveGate
from hallo_numguard.guard.step.armed import ARMED_STEPS, ArmedSteps
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.early_warnings import EarlyWarnings
from hallo_numguard.guard.step.figure_exchange import FigureExchange
from hallo_numguard.guard.step.local_gradients import LocalGradients
from hallo_numguard.guard.step.pending import MAX_CALLS, PendingStep, StepOwner
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.guard.step.step_call import StepCall
from hallo_numguard.guard.step.updates import UpdateWatch
from hallo_numguard.guard.update_checks import UpdateChecks
from hallo_numguard.guard.weight_checks import WeightChecks
from hallo_numguard.ops.device import AsyncHostCopy
from hallo_numguard.tracing.rerun import is_rerunning
from hallo_numguard.trackers.base import Sink
from hallo_numguard.trackers.choose import sink_for
from hallo_numguard.trackers.feed import Feed

_log = logging.getLogger("hallo_numguard")

P = ParamSpec("P")
T = TypeVar("T")

ALONE_AFTER_A_FAILURE = "the guard has failed on a rank"
STATUS_LEFT = -1  # off guard: the status of any other rank counts
STATUS_FAILED = 2  # above 0 (finite) and 1 (not finite): the maximum over the ranks counts
MAX_LOSSES = 4096  # of a step
MAX_FAILURES = 3  # of essential parts, after which they are not tried any more


class Session:
    """Watches the steps of one model on this rank.

    Each part is a probe that is contained on its own. The scan of the gradients is essential: a step of which it fails
    is checked by others, and `failed` is set when that comes again.

    Attributes:
        failed: Whether an essential part has failed several times, and is not tried any more.
        probes: Parts that are not essential, each contained on its own.
        losses_are_shares: Whether the recorded losses of a step's micro-batches add up to the loss of the step, as
            each is divided by their number.
    """

    def __init__(
        self,
        model: GuardedModel,
        ranks: Ranks,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.failed = False
        self.losses_are_shares = False
        self._failures = 0  # of essential parts
        self._model = model
        self._ranks = ranks
        self._config = config
        self.probes = Probes()
        self._log = FindingLog(ranks)
        self._steps = StepOwner()
        limit = _near_limit(model.parameters)
        is_part = model.exchanges_figures and ranks.size > 1
        self._exchange = FigureExchange(ranks, model.device) if is_part else None
        self._recorder = Recorder(config.history, [item.name for item in model.parameters], limit, is_part)
        sinks = [*sinks, *map(sink_for, config.sinks)]  # on every rank, so that all refuse an invalid one
        self._feed = Feed(sinks if ranks.rank == 0 else [])
        self._batch = Batch(model.module, self._steps, model.unchecked, model.stage)
        self._armed = ArmedSteps(model.module or nn.Module(), model.is_compiled, self._steps, model.stage is None)
        self._local_gradients = LocalGradients(model.parameters, config.local_gradients, self._steps, self.probes)
        self._replayer = (
            Replayer(model, model.module, model.forward, self._batch, ranks, self._local_gradients)
            if model.module is not None and model.forward is not None
            else None
        )
        folder = None if config.repro_dir is None else Path(config.repro_dir)
        bundle_files = ReportFiles("the bundle", config.dump_keep)
        self._bundles = Bundles(folder, bundle_files, model.module, self._replayer, ranks, model.device, model.settings)
        self._warnings = EarlyWarnings(model, self._batch, self._recorder.read, self._log.note, self.probes)
        self._updates = UpdateWatch(model, config.check_updates)
        self._feeding = FeedingModules(model.also, lambda: self._steps.pending.feeding_calls)
        self._collector = EvidenceCollector(
            model, ranks, self._batch, self._recorder, self._local_gradients, self._armed, self._updates, self._feeding
        )
        self._checkpoints = KeptCheckpoints(config, model, ranks)
        self._reporter = Reporter(
            model, ranks, config, on_overflow, self.probes, self._checkpoints, self._bundles, self._feed
        )
        parts = self._recorder, self._reporter, self._log
        self._losses = LossChecks(ranks, config.policy, self._steps, self._batch, self._armed, self._replayer, *parts)
        self._update_checks = UpdateChecks(model, ranks, self._steps, self._updates, self._collector, *parts)
        self._weights = WeightChecks(model, ranks, config.policy, self._steps, self._collector, *parts, self.probes)
        self._skipped = 0  # steps in a row
        self._rank_faults: dict[int, int] = {}  # step of the last, by rank
        with contextlib.ExitStack() as undo:  # hooks come last, and go if one of them cannot be put on
            undo.callback(self.stop)
            self._collector.start()
            self._local_gradients.start()
            self._feeding.start()
            self._warnings.start()
            undo.pop_all()

    @property
    def last_report(self) -> OverflowReport | None:
        """Report on the last step whose gradients or loss were not finite, or None.

        Replaced by one that is no longer provisional when a later step was finite.
        """
        return self._reporter.last

    @property
    def reported_at(self) -> int:
        """Serial number of that report among those of this process."""
        return self._reporter.reported_at

    @property
    def findings(self) -> list[Finding]:
        """Findings other than overflows; see `Finding`. The last 1000."""
        return self._log.findings

    @property
    def save_gate(self) -> SaveGate:
        """Check before the run is saved."""
        return self._weights.save_gate

    def history(self) -> list[StepRecord]:
        """Returns the flight recorder's steps, oldest first. Waits for rows that are still on their way."""
        self._complete_figures()
        return self._recorder.read()

    def grad_norm(self) -> torch.Tensor:
        """Returns the last step's gradient norm: see `Guard.grad_norm`."""
        self._complete_figures()
        return self._recorder.last_norm()

    def _complete_figures(self) -> None:
        """Gives the last step the figures of all ranks, where each holds a slice."""
        if self._exchange is not None:
            whole = self.probes.run("exchange of figures", self._exchange.finish)
            self.probes.run("flight recorder", self._recorder.complete, whole)

    def stop(self) -> None:
        """Releases the model; reports and history stay readable."""
        self.probes.run("trackers", self._write_figures, wait=True)
        self.probes.run("trackers", self._feed.close)
        self._collector.stop()
        self._local_gradients.stop()
        self._armed.stop()
        self._feeding.stop()
        self._warnings.stop()
        self._steps.pending.clear()
        self._ranks.leave()

    def add_parameters(self, parameters: Sequence[NamedTensor]) -> None:
        """Adds parameters that the optimizer trains from now on, to the list of `GuardedModel` too."""
        self._model.parameters.extend(parameters)
        self._recorder.add_names([item.name for item in parameters])
        self._warnings.parameters_were_added()
        self._local_gradients.parameters_were_added(len(parameters))
        self._updates.parameters_were_added()
        self._collector.parameters_were_added()
        self.inspect_weights("parameters were added")

    # -- a step ------------------------------------------------------------------------------------------------------

    def on_forward_start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Records the arguments of a forward pass. Keeps references until the step is over."""
        if is_rerunning():
            return
        self.probes.run("record of the batch", self._batch.add, args, kwargs)
        self.probes.run("watch of the operations", self._armed.model_is_called)

    def on_forward_end(self, output: Any) -> None:
        """Records the output of the forward pass."""
        if is_rerunning():
            return
        self.probes.run("watch of the operations", self._armed.model_has_returned)
        self.probes.run("record of the batch", self._batch.note_output, output)

    def on_step_start(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> StepCall | None:
        """Records the call of a function that makes a step's loss, so that it can be repeated after an overflow."""
        if not torch.is_grad_enabled() or is_rerunning():
            return None
        return self.probes.run("record of the step", self._add_step_call, function, args, kwargs)

    def on_step_end(self, call: StepCall | None, result: Any) -> None:
        """Records what the function has returned."""
        if call is not None:
            self.probes.run("record of the step", call.end, result)

    def _add_step_call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> StepCall:
        pending = self._steps.pending
        pending.step_calls.append(StepCall.begin(function, args, kwargs, pending.calls_before + len(pending.calls)))
        del pending.step_calls[:-MAX_CALLS]
        return pending.step_calls[-1]

    def on_loss(self, loss: torch.Tensor, is_scaled: bool = False, of_backward: bool = False, node: Any = None) -> None:
        """Records a micro-batch's loss.

        Args:
            loss: The loss.
            is_scaled: Whether it is the root of a backward pass, multiplied by the loss scale if there is one.
            of_backward: Whether a backward pass from it has reached the model.
            node: Autograd node where that pass has begun.
        """
        pending = self._steps.pending
        losses = pending.losses
        losses.append(loss.detach())
        pending.loss_node = loss.grad_fn if node is None else node
        pending.losses_are_scaled = pending.losses_are_roots = is_scaled
        pending.losses_of_backward = of_backward
        if len(losses) > MAX_LOSSES:  # passes that no step follows
            del losses[: MAX_LOSSES // 2]

    def judge_alone(self, because: str) -> None:
        """Makes this rank judge the step by itself, as others have other gradients; "" for what is usual."""
        self._steps.pending.alone_because = because

    def forget_losses(self) -> None:
        """Forgets the losses of this step: the recorded values were none."""
        self._steps.pending.forget_losses()

    @property
    def has_losses(self) -> bool:
        """Whether this step has losses so far."""
        return bool(self._steps.pending.losses)

    @property
    def seeds_seen(self) -> int:
        """Number of gradients that have arrived at what the model has returned, in all steps so far."""
        return self._batch.seeds_seen

    @property
    def sees_seeds(self) -> bool:
        """Whether a gradient that reaches the calls of this step is seen where it arrives."""
        return self._batch.sees_seeds

    def before_step(
        self, number: int, scaling: LossScaling, gradients: ScannedPieces, whole: torch.Tensor | None = None
    ) -> None:
        """Records the gradients. No host sync.

        Args:
            number: Number of the step, from 1.
            scaling: State of the loss scaler.
            gradients: Scan of this rank's gradients.
            whole: Figures of the whole model's gradients; see `Recorder.begin`.
        """
        self.probes.run("watch of the operations", self._armed.backward_is_over)
        pending = self._steps.pending
        pending.number, pending.scaling, pending.gradients = number, scaling, gradients
        pending.is_scanned = True
        self._checkpoints.step_is_unclean = False
        self.probes.run("record of the loss", pending.unscale_losses)
        self._complete_figures()  # of the step before
        loss = self.probes.run("record of the loss", self._loss_of_the_step)
        counts = pending.losses_of_backward
        recorder = self._recorder.begin
        part = self.probes.run("flight recorder", recorder, number, scaling.scale, gradients, loss, counts, whole)
        if self._exchange is not None:
            self._exchange.start(part)
        self.probes.run("early warnings", self._warnings.before_step, number, scaling.scale, gradients)
        self.probes.run("check of the losses", self._losses.before_step)
        self.probes.run("look at the updates", self._updates.before, number, gradients.table)

    def begin_unscanned(self, number: int, scaling: LossScaling) -> None:
        """Begins a step whose gradients could not be scanned: others have to decide whether they are finite."""
        self.probes.run("watch of the operations", self._armed.backward_is_over)
        pending = self._steps.pending
        pending.number, pending.scaling, pending.is_scanned = number, scaling, False
        self._checkpoints.step_is_unclean = False
        self.probes.run("look at the updates", self._updates.before, number, None)
        if self._exchange is not None:
            self._complete_figures()
            self._exchange.start(None)

    def _loss_of_the_step(self) -> torch.Tensor | None:
        """The mean loss of the micro-batches: their sum, where the framework has divided each by their number."""
        losses = self._steps.pending.losses
        if len(losses) < 2:
            return losses[0] if losses else None
        numbers = torch.stack([loss.reshape(()).to(losses[0].device, torch.float64) for loss in losses])
        return numbers.sum() if self.losses_are_shares else numbers.mean()

    def swap_step(self, step: PendingStep | None = None) -> PendingStep:
        """Switches to another step, by default a new one; returns the previous one. See `StepOwner`.

        No `before_step` may come between setting a step aside and resuming it.
        """
        return self._steps.swap(PendingStep() if step is None else step)

    def step_is_left_to_the_optimizer(self, nonfinite: AsyncHostCopy) -> None:
        """Lets `history` say of a step whether it was applied before `after_step` does.

        Args:
            nonfinite: Numbers of which the first is 0 if the optimizer applies the step.
        """
        self.probes.run("flight recorder", self._recorder.leave_to_the_optimizer, nonfinite)

    def look_at_update(self) -> None:
        """Looks at what the optimizer has just written; done by `after_step` if that comes at once. No host sync."""
        self.probes.run("look at the updates", self._updates.after, self._steps.pending.number)

    def after_step(self, applied: bool) -> None:
        """Completes the step. `check_update` is to follow if it was applied."""
        if applied:
            self.look_at_update()
            if self.probes.run("look at the updates", self._update_checks.after_update):
                self._checkpoints.step_is_unclean = True
        if self._steps.pending.is_scanned:
            self._record(applied)
        self.probes.run("scan of local gradients", self._local_gradients.step_is_over, applied)
        if not applied:
            self.probes.run("running statistics", self._restore_statistics)
        self.probes.run("watch of the operations", self._armed.step_is_over)
        self._steps.pending.clear()
        if not applied:
            return
        if self._skipped and self._reporter.last is not None:
            pending = self._steps.pending
            self._reporter.last = confirm(self._reporter.last, pending.scaling.scale, self._skipped)
            if self._ranks.speaks:
                _log.info("step %d is finite again: %s", pending.number, self._reporter.last.advice)
        self._skipped = 0

    def _record(self, applied: bool) -> None:
        """Records the figures of the step, and what follows from them."""
        self.probes.run("flight recorder", self._recorder.end, applied)
        self._complete_figures()  # every rank has since met the others in the optimizer's step
        # A skipped step has been waited for, and may be the last one: what is on its way is worth waiting for as well.
        records = self.probes.run("flight recorder", self._recorder.fresh, wait=not applied) or []
        self.probes.run("early warnings", self._warnings.after_step, applied, records)
        self.probes.run("flight recorder", self._check_applied, records)
        self.probes.run("check of the losses", self._losses.check, records, applied)
        self.probes.run("trackers", self._feed.write, records, self._log.alarms)
        self.probes.run("checkpoint keeper", self._checkpoints.step_is_over, applied, records)
        self.probes.run("evidence", self._collector.step_is_over, applied)

    def check_update(self) -> BaseException | None:
        """Reports weights that the update of the last step made non-finite: see `UpdateChecks.report`."""
        return self.probes.run("look at the updates", self._update_checks.report)

    def take_error(self) -> BaseException | None:
        """Returns what is to be raised after a step that was applied, once."""
        return self._losses.take_error()

    def on_uncleared_gradients(self, step: int) -> NumericsError | None:
        """Tells of gradients that nobody has cleared: see `LossChecks.gradients_were_not_cleared`."""
        return self._losses.gradients_were_not_cleared(step)

    # -- an overflow: every rank comes here, and takes part in every reduction -------------------------------------

    def found_inf(self) -> bool:
        """Returns whether any rank's gradients are not finite, the same on all ranks, which must all call it.

        For optimizers that do not check by themselves. Synchronises. A rank whose guard has failed takes part, and then
        `failed` is set on all of them.
        """
        pending, bad = self._steps.pending, None
        if pending.is_scanned:
            bad = self.essential("check of the gradients", lambda: bool(pending.gradients.table.any_nonfinite()))
        status = STATUS_FAILED if bad is None else int(bad)
        agreed = self._ranks.highest(status, self._model.device)
        self.failed = agreed == STATUS_FAILED
        return agreed == 1

    def answer_figures(self) -> bool:
        """Takes part in the figures of the other ranks, when this one is not on guard any more.

        Returns:
            Whether any of them still is.
        """
        if self._exchange is None or self._exchange.all_have_left:
            return False
        with contain_failures("exchange of figures", "the other ranks' figures lack this one's"):
            self._exchange.leave()
        return not self._exchange.all_have_left

    def answer(self) -> bool | None:
        """Takes part in `found_inf` of the other ranks, when this one is not on guard any more.

        Returns:
            Whether any of them found gradients that are not finite; None if none is on guard any more.
        """
        agreed = self._ranks.highest(STATUS_LEFT, self._model.device)
        return None if agreed == STATUS_LEFT else agreed == 1

    def overflow(self, serial: int, skipped: bool = True) -> BaseException | None:
        """Finds the origin and sets `last_report`. All ranks must call it in the same step.

        A rank judges by itself if another does not come within a minute, or has detached its guard.

        Args:
            serial: Number of the step that counts up whatever happens, the same on all ranks.
            skipped: Whether the step is skipped, which it should be.

        Returns:
            Exception that every rank has to raise once the step is dropped; None to go on. If the guard fails on any
            rank, all of them report the step without a cause.
        """
        where = f"step {serial}"
        with self._ranks.assembled(where, self._steps.pending.alone_because):
            with contain_failures("diagnosis", "the step is skipped without a cause"):
                return self._explain(skipped)
            self._ranks.fail(where)  # reached after a contained failure only
            return self._report_without_cause()

    def _explain(self, skipped: bool) -> BaseException | None:
        self._skipped = self._skipped + 1 if skipped else 0
        if self._ranks.lowest(int(self._steps.pending.is_scanned), self._model.device) == 0:
            return self._report_without_cause()
        stage, lost, dropped = self._model.stage, None, 0
        if stage is not None:
            lost, dropped = share_losses(self._ranks, stage, self._steps.pending, self._model.device)
        step = self._bad_step()
        view = self._collector.scan(step)
        agreed = self._collector.agree(view)
        evidence = self._collector.evidence(step, agreed, self._reporter.last, self._rank_faults)
        calls_before = self._ranks.highest(self._steps.pending.calls_before, self._model.device)
        evidence = replace(evidence.with_first_losses(dropped), lost_between=lost, calls_before=calls_before)
        replay = None if self._replayer is None else self._replayer.explain(evidence, step.losses)
        evidence = replace(evidence, replay=replay, alone_because=self._ranks.alone_because)
        report = judge(evidence)
        report = replace(report, evidence=(*report.evidence, *self._model.remarks(report)))
        report = self._reporter.completed(report, self.history())
        is_open = is_unexplained(report)
        if is_open or evidence.watched is not None:
            self._armed.arm()
        if is_open and self._armed.is_armed:
            report = messages.with_armed_steps(report, ARMED_STEPS)
        self.probes.run("evidence", self._weights.note_unchecked)
        self._collector.reported(view)
        self._updates.alarm()
        self._updates.news()  # this report is about them
        if report.verdict is Verdict.RANK_FAULT and report.first is not None and report.first.rank is not None:
            self._rank_faults[report.first.rank] = report.step
        bundle = self._take_bundle(report, evidence)
        return self._reporter.act(report, bundle, may_settle=evidence.scaling.can_fall and evidence.loss is None)

    def _report_without_cause(self) -> BaseException | None:
        """Reports a bad step of which nothing else is known, because the guard has failed on this rank or another."""
        pending = self._steps.pending
        report = messages.unexplained(pending.number, pending.scaling, self._ranks.size, self._skipped)
        report = self._reporter.completed(report, ())
        with self._ranks.assembled("", ALONE_AFTER_A_FAILURE):
            return self._reporter.act(report, may_settle=pending.scaling.can_fall)

    def _bad_step(self) -> BadStep:
        losses = self._steps.pending.losses
        if not all(map(math.isfinite, losses)) and not self._has_harmless_roots():
            return BadStep(self._steps.pending, self._skipped, losses, True)
        # A finite loss may not depend on all that the model has returned.
        outputs = self.probes.run("record of the batch", self._batch.stand_ins_for_losses) or []
        is_unlike = self._steps.pending.losses_are_roots and any(map(math.isnan, outputs))
        if is_unlike or not all(map(math.isfinite, losses)) or not losses:
            return BadStep(self._steps.pending, self._skipped, outputs, False)
        return BadStep(self._steps.pending, self._skipped, losses, True)

    def _has_harmless_roots(self) -> bool:
        """Whether losses are infinite in their own dtype alone, as after a multiplication by a loss scale.

        The gradients that they have given to the model's outputs are finite.
        """
        pending = self._steps.pending
        if not pending.losses_are_roots or any(map(math.isnan, pending.losses)):
            return False
        return self.probes.run("record of the batch", self._batch.seeds_are_finite) is True

    @property
    def keeps_scale(self) -> bool:
        """Whether the loss scale is to stay: the non-finite value arose before the loss was scaled."""
        report = self._reporter.last
        return (
            self._config.policy.keep_scale
            and report is not None
            and report.first is not None
            and report.first.kind not in ("gradient", "reduction")
        )

    @property
    def goes_back(self) -> bool:
        """Whether all ranks have agreed to go back to a checkpoint, and have not yet."""
        return self._checkpoints.to_undo is not None

    def go_back(self, run: Any) -> None:
        """Rolls a run back if that was agreed: see `KeptCheckpoints.go_back`. All ranks call it after every step."""
        if self._checkpoints.go_back(run):
            self._skipped = 0

    def _write_figures(self, wait: bool) -> None:
        self._complete_figures()
        records = self._recorder.fresh(wait)
        self.probes.run("check of the losses", self._losses.check, records, False)
        self._feed.write(records, self._log.alarms)

    def _check_applied(self, records: Sequence[StepRecord]) -> None:
        """Tells of steps that were applied though their gradients were not finite, and of which there is no report."""
        for row in records:
            if row.applied and row.nonfinite and not self._reporter.has_reported(row.step):
                message = (
                    f"step {row.step} was applied though {row.nonfinite} elements of its gradients were not finite: "
                    "the framework has not checked them, or not these"
                )
                self._log.note(Finding("bad_step_applied", message, row.step))

    def _restore_statistics(self) -> None:
        """Puts back the running statistics that the skipped step's batch has made non-finite, on this rank."""
        names = self._batch.restore_statistics()
        if names:
            number = self._steps.pending.number
            message = (
                f"step {number}: the batch made running statistics non-finite ({listed(names)}); as the step was "
                "skipped, they were put back to what they were before it"
            )
            self._log.note(Finding("statistics_restored", message, number, names[0]))

    def _take_bundle(self, report: OverflowReport, evidence: Evidence) -> Bundle | None:
        replay = evidence.replay
        micro_batch, number = (evidence.micro_batch, 0) if replay is None else (replay.micro_batch, replay.number)
        return self._bundles.take(report, micro_batch, number)

    # -- weights outside of a step -----------------------------------------------------------------------------------

    def inspect_weights(self, when: str) -> None:
        """Reads this rank's parameters, buffers and optimizer state, and reports what is not finite."""
        self.probes.run("scan of the weights", self._weights.inspect, when)

    def check_save(self, save: Save, is_on_guard: bool = True) -> NumericsError | None:
        """Reads what is about to be saved: see `WeightChecks.check_save`."""
        return self._weights.check_save(save, is_on_guard)

    # -- failures of our own -----------------------------------------------------------------------------------------

    def essential(self, part: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns what `work` returns; None if it fails. After a few failures `failed` is set, and it is not tried."""
        if self.failed:
            return None
        with contain_failures(part, "this step is checked without it"):
            return work(*args, **kwargs)
        self._failures += 1  # reached after a contained failure only
        self.failed = self._failures >= MAX_FAILURES
        return None


def _near_limit(parameters: Sequence[NamedTensor]) -> float | None:
    """The largest number that gradients can hold, where training comes near it."""
    halves = (item.tensor.dtype is torch.float16 and item.tensor.requires_grad for item in parameters)
    return float(torch.finfo(torch.float16).max) if any(halves) else None
