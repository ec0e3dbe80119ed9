"""The guard of one model, of no framework: what was seen in a step, what it means, and what is to be done about it.

An integration says when (`before_step`, `overflow`, `after_step`), gives the gradients and the loss scaling, and
carries out what comes back. Nothing here knows where gradients come from or how a step is skipped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from hallo_numguard.config import GuardConfig, OverflowCallback
from hallo_numguard.errors import CheckpointFailed, NumericsError
from hallo_numguard.files import write_whole
from hallo_numguard.monitor import attribution, policy
from hallo_numguard.monitor.agreement import Ranks
from hallo_numguard.monitor.attribution import (
    LegalNonfinites,
    NamedTensor,
    ReadyOrder,
    bad_positions,
    only_negative_infinity,
)
from hallo_numguard.monitor.batch import Batch, Call
from hallo_numguard.monitor.bundle import Bundle, Bundles
from hallo_numguard.monitor.evidence import Evidence, Scaling
from hallo_numguard.monitor.layout import NONE, Piece, Sums, by_parameter
from hallo_numguard.monitor.local import LocalGradients
from hallo_numguard.monitor.recorder import Recorder
from hallo_numguard.monitor.replay import Forward, Replayed, Replayer
from hallo_numguard.monitor.verdict import judge, needs_replay, settled
from hallo_numguard.monitor.watch import Watch
from hallo_numguard.records import Finding, Offender, OverflowReport, StepRecord, Verdict
from hallo_numguard.reports.environment import collect
from hallo_numguard.sinks.base import Sink
from hallo_numguard.sinks.choose import sink_for
from hallo_numguard.sinks.feed import Feed

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")

_FAILED = 2  # graver than any answer
_MOST_FINDINGS = 1000
_UNKNOWN = -(1 << 20)  # lower than any power of two

_OUTLOOK = {
    "parameter": "If the model reads it, the first loss will be NaN, and no loss scale can mend that.",
    "buffer": "If the forward pass reads it, the loss will be NaN.",
    "optimizer_state": "The next step that is applied writes it into the weights.",
}


@dataclass(frozen=True)
class Scanned:
    """One pass over this rank's gradients.

    Attributes:
        packed: int64 [pieces, 8], a `StatsTable.packed`.
        pieces: What each row is of: parameters by their position in the session's list.
        groups: The rows of each of the optimizer's parameter groups.
    """

    packed: torch.Tensor
    pieces: Sequence[Piece]
    groups: Sequence[slice] = ()


@dataclass(frozen=True)
class Model:
    """What there is to be named.

    Attributes:
        parameters: In registration order.
        buffers: Likewise.
        sliced_gradients: Whether every rank holds another slice of the gradients; else each holds all of them.
        scan_state: Reads the optimizer's own tensors once: moments, master copies.
        sliced_state: Whether every rank holds another slice of those.
        device: Where small reductions between ranks are made.
        module: Whose forward is called in training: names its arguments. None if nobody shows the calls.
        forward: Calls it once more, as the framework does; None if that cannot be.
        backward_again: Whether gradients with respect to its parameters can then be asked for by name.
        settings: The framework's configuration, to be kept with what was found.
        can_go_back: Tells whether whoever carries out what the session says can call `go_back` when a step is over; the
            same on every rank.
    """

    parameters: list[NamedTensor]
    buffers: list[NamedTensor]
    sliced_gradients: bool
    scan_state: Callable[[], Scanned]
    sliced_state: bool
    device: torch.device
    module: nn.Module | None = None
    forward: Forward | None = None
    backward_again: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    can_go_back: Callable[[], bool] = lambda: False


class Held(NamedTuple):
    """What is known of a step while nobody has waited for whether it was clean.

    Attributes:
        step, scaling, scanned: See `Session.before_step`.
        losses, calls, local: What was seen of it before.
    """

    step: int = 0
    scaling: Scaling = Scaling(1.0, dynamic=False)
    scanned: Scanned = Scanned(torch.empty((0, 8), dtype=torch.int64), ())
    losses: Sequence[torch.Tensor] = ()
    calls: Sequence[Call] = ()
    local: Sequence[tuple[torch.Tensor, Piece]] = ()


class _Local(NamedTuple):
    """What one rank sees: weights (and, as the last row, the loss), gradients, optimizer state, local gradients.

    `input` is the first bad tensor of the batch and its micro-batch, as JSON, and `power` the loss scale at which the
    last finite steps would have fitted, as a power of two. `marks`, int64 [weights, 2]: whether the weight is not
    finite here in a way that no clean step was seen with, and whether it was not finite here before any step. Ranks
    that hold slices know each of their own only.
    """

    weights: Sums
    marks: torch.Tensor
    gradients: Sums
    state: Sums
    before_reduction: Sums
    input: str | None
    power: int


class BeforeReduction(NamedTuple):
    """Of the gradients before the reduction: how many ranks had bad ones, and the lowest such rank of a parameter."""

    ranks: int
    rank_of: dict[int, int]


class _Agreed(NamedTuple):
    """What all ranks see together, the same on each; with tensors of which there may be copies, the lowest bad rank."""

    weights: Sums
    weight_ranks: torch.Tensor
    marks: list[list[int]]
    gradients: Sums
    state: Sums
    state_ranks: torch.Tensor
    before_reduction: BeforeReduction | None
    loss_known: bool
    batch_known: bool
    input: str | None
    power: int


def _all(sums: Sums, value: bool) -> torch.Tensor:
    return torch.full_like(sums.first, int(value), dtype=torch.bool)


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
        self._weights = [*model.parameters, *model.buffers]
        self._ranks = ranks
        self._config = config
        self._on_overflow = on_overflow
        self._legal = LegalNonfinites()
        # Weights of this rank that were not finite before any forward pass of ours. Master copies of them are bad
        # because they are.
        self._known: set[int] = set()
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
        self._order = ReadyOrder()
        self._order.learn(model.parameters)
        self._local = LocalGradients(model.parameters, config.local_gradients)
        self._losses: list[torch.Tensor] = []  # of this step's micro-batches, detached
        self._loss_shown = True
        self._step = 0
        self._scaling = Scaling(1.0, dynamic=False)
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
        self._order.stop()
        self._local.stop()
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

    def before_step(self, step: int, scaling: Scaling, scanned: Scanned) -> None:
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
        calls, local = self._batch.exchange(held.calls), self._local.exchange(list(held.local))
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
        self._order.stop()
        self._local.step_is_over(clean=applied)
        if not applied:
            return
        self._legal.clean_step()
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
        self._loss_shown = bool(self._losses)
        if not self._losses:
            self._losses = self.guarded(self._batch.in_place_of_losses) or []
        local = self.guarded(self._look)
        if self._anyone_failed():
            return None
        agreed = self._agree(local)
        evidence = self.guarded(lambda: self._evidence(agreed))
        if self._anyone_failed():
            return None
        evidence = replace(evidence, replay=self._replay(evidence))
        report = self.guarded(
            lambda: replace(
                judge(evidence), history=tuple(self._recorder.read()), environment=collect(self._ranks.rank)
            )
        )
        if self._anyone_failed():
            return None
        self._legal.note(local.weights)
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
        self._local.muted = True
        try:
            return self._bundles.take(report, micro_batch, number)
        finally:
            self._local.muted = False

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

    def _agree(self, local: _Local) -> _Agreed:
        """A fixed number of reductions of fixed sizes: every rank takes part in each, whatever it has seen."""
        ranks, device = self._ranks, self._model.device
        weights, weight_ranks = ranks.combine(local.weights, self._sliced_weights())
        gradients, _ = ranks.combine(local.gradients, _all(local.gradients, self._model.sliced_gradients))
        state, state_ranks = ranks.combine(local.state, _all(local.state, self._model.sliced_state))
        return _Agreed(
            weights,
            weight_ranks,
            ranks.any(local.marks).tolist(),
            gradients,
            state,
            state_ranks,
            self._before_the_reduction(local.before_reduction),
            loss_known=ranks.lowest(int(bool(self._losses)), device) == 1,
            batch_known=ranks.lowest(int(self._batch.seen), device) == 1,
            input=ranks.lowest_told(local.input, device),
            power=ranks.lowest(local.power, device),
        )

    def _look(self) -> _Local:
        gradients = by_parameter(self._scanned.packed, self._scanned.pieces, len(self._model.parameters))
        weights = attribution.look([*self._weights, self._loss_tensor()])
        before = self._local.sums(self._model.device)
        state, batch = self._look_at_state(), self._look_at_batch()
        return _Local(weights, self._marks(weights), gradients, state, before, batch, self._settling_power())

    def _marks(self, weights: Sums) -> torch.Tensor:
        marks = torch.zeros((len(self._weights), 2), dtype=torch.int64)
        for position in bad_positions(weights):
            if position < len(self._weights):
                marks[position, 0] = int(not self._legal.is_legal(weights, position))
        marks[list(self._known), 1] = 1
        return marks.to(self._model.device)

    def _look_at_batch(self) -> str | None:
        if not self._batch.seen:
            return None
        losses = [bool(torch.isfinite(loss)) for loss in self._losses]
        found = self._batch.first_nonfinite(self._ranks.rank, losses)
        return None if found is None else json.dumps([asdict(found[0]), found[1]], ensure_ascii=False)

    def _settling_power(self) -> int:
        """The loss scale at which the last finite steps would have fitted, as a power of two."""
        unscaled = [
            (row.absmax / row.loss_scale, row.limit) for row in self._recorder.read() if row.applied and row.absmax
        ]
        rooms = [math.floor(math.log2(limit / absmax)) for absmax, limit in unscaled if limit is not None]
        return min(rooms, default=_UNKNOWN)

    def _look_at_state(self) -> Sums:
        state = self._model.scan_state()
        sums = by_parameter(state.packed, state.pieces, len(self._model.parameters))
        return Sums(*[column.to(self._model.device) for column in sums])

    def _before_the_reduction(self, local: Sums) -> BeforeReduction | None:
        """What the ranks' own gradients were, if all of them looked. A fixed number of reductions in any case."""
        looked = self._ranks.lowest(int(self._local.watching), self._model.device) == 1
        sums, ranks = self._ranks.combine(local, _all(local, False))
        bad = self._ranks.total(int(bool((local.first != NONE).any())), self._model.device)
        if not looked:
            return None
        return BeforeReduction(bad, {position: int(ranks[position]) for position in bad_positions(sums)})

    def _sliced_weights(self) -> torch.Tensor:
        sliced = [item.slice is not None for item in self._weights]
        return torch.tensor([*sliced, False], device=self._model.device)

    def _replay(self, evidence: Evidence) -> Replayed | None:
        """Runs the batch again where that can tell more; the same on every rank, which all see the same evidence."""
        if self._replayer is None or not evidence.loss_known or not needs_replay(evidence):
            return None
        if evidence.loss is None and not self._model.backward_again:
            return Replayed("the gradients of sharded parameters cannot be asked for by name")
        self._local.muted = True
        try:
            if evidence.loss is not None:
                found = self._replayer.of_a_bad_loss([bool(torch.isfinite(loss)) for loss in self._losses])
            else:
                found = self._replayer.of_bad_gradients(evidence.scaling.scale)
        finally:
            self._local.muted = False
        return replace(found, origin=found.origin and self._by_its_first_name(found.origin))

    def _by_its_first_name(self, offender: Offender) -> Offender:
        """A tied weight has one name, whichever of the modules that use it was found."""
        for weight in self._weights:
            if offender.name in weight.aliases:
                return replace(offender, name=weight.name, aliases=weight.aliases)
        return offender

    def _evidence(self, agreed: _Agreed) -> Evidence:
        suspects: list[Offender] = []
        bystanders: list[Offender] = []
        loss = None
        weight_ranks, state_ranks = agreed.weight_ranks.tolist(), agreed.state_ranks.tolist()
        for position in bad_positions(agreed.weights):
            if position == len(self._weights):
                loss = self._loss_tensor().offender(agreed.weights, position, weight_ranks[position])
                continue
            offender = self._weights[position].offender(agreed.weights, position, weight_ranks[position])
            is_new, was_known = map(bool, agreed.marks[position])
            suspect = is_new and self._may_be_origin(agreed.weights, position, was_known)
            (suspects if suspect else bystanders).append(offender)
        ready = self._order.sort(bad_positions(agreed.gradients))
        before = agreed.before_reduction
        bad_input, micro_batch = (None, 0) if agreed.input is None else _read_input(agreed.input)
        return Evidence(
            step=self._step,
            skipped=self._skipped,
            scaling=self._scaling,
            suspects=suspects,
            bystanders=bystanders,
            state=[
                self._state(agreed.state, at, state_ranks[at])
                for at in bad_positions(agreed.state)
                if not agreed.marks[at][1]
            ],
            input=bad_input,
            micro_batch=micro_batch,
            batch_known=agreed.batch_known,
            tensors=len(self._weights),
            loss=loss,
            loss_known=agreed.loss_known,
            loss_shown=self._loss_shown,
            gradients=[self._gradient(agreed.gradients, position, before) for position in ready],
            bad_ranks=None if before is None else before.ranks,
            world_size=self._ranks.size,
            settles_at=None if agreed.power == _UNKNOWN else min(2.0**agreed.power, self._scaling.scale / 2),
            proved_before=self._proved_before(),
            rank_faults=dict(self._rank_faults),
        )

    def _proved_before(self) -> float | None:
        """The loss scale that a replay has named since the last step that was applied."""
        before = self.last_report
        if before is None or self._skipped < 2 or before.verdict is not Verdict.SCALE_TOO_HIGH or before.provisional:
            return None
        return before.settles_at

    def _may_be_origin(self, weights: Sums, position: int, was_known: bool) -> bool:
        if self._weights[position].kind == "parameter":
            return True
        # A forward pass on a bad batch poisons running statistics: that is damage, unless it was there before. And
        # -Inf alone is how additive masks are written.
        return was_known and not only_negative_infinity(weights, position)

    def _gradient(self, gradients: Sums, position: int, before: BeforeReduction | None) -> Offender:
        rank = 0 if self._ranks.size == 1 else None  # after the reduction it is every rank's
        if before is not None:
            rank = before.rank_of.get(position, rank)
        return replace(self._model.parameters[position].offender(gradients, position, rank), kind="gradient")

    def _state(self, state: Sums, position: int, rank: int) -> Offender:
        return replace(self._model.parameters[position].offender(state, position, rank), kind="optimizer_state")

    def _loss_tensor(self) -> NamedTensor:
        """The micro-batches' losses as one tensor, so that the index of an offender is the micro-batch."""
        losses = [loss.reshape(()).to(torch.float32) for loss in self._losses]
        if not losses:
            return NamedTensor("loss", "loss", torch.zeros((), device=self._model.device))
        kind, name = ("loss", "loss") if self._loss_shown else ("activation", "output")
        return NamedTensor(kind, name, losses[0] if len(losses) == 1 else torch.stack(losses))

    # -- weights outside of a step -----------------------------------------------------------------------------------

    def inspect_weights(self, when: str) -> None:
        """Looks at what this rank has of parameters, buffers and optimizer state, and tells what is not finite."""
        sums = attribution.look(self._weights)
        self._legal.note(sums)
        self._known = set(bad_positions(sums))
        for position in bad_positions(sums):
            weight = self._weights[position]
            if weight.kind == "buffer" and only_negative_infinity(sums, position):
                continue
            offender = weight.offender(sums, position, self._ranks.rank)
            self._tell(offender, when, mine=self._ranks.rank == 0 or weight.slice is not None)
        state = self._look_at_state()
        for position in bad_positions(state):
            if position in self._known:
                continue
            offender = self._state(state, position, self._ranks.rank)
            self._tell(offender, when, mine=self._ranks.rank == 0 or self._model.sliced_state)

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


def _read_input(told: str) -> tuple[Offender, int]:
    document, micro_batch = json.loads(told)
    return Offender.from_document(document), micro_batch
