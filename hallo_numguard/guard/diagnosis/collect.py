"""Combines the ranks' observations of a bad step into evidence, the same on each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hallo_numguard.core.documents import decode, encode
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis.evidence import Evidence
from hallo_numguard.guard.diagnosis.texts import source_as_text
from hallo_numguard.guard.diagnosis.weight_history import WeightHistory, history_of
from hallo_numguard.guard.feeding_modules import BadFeed, FeedingModules
from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.named_tensors import (
    NamedTensor,
    ReadyOrder,
    ToleratedNonfinites,
    is_persistent,
    scan_tensors,
    stats_of,
)
from hallo_numguard.guard.parameter_stats import NONE, ParameterStats
from hallo_numguard.guard.step.armed import ArmedSteps
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.local_gradients import LocalGradients
from hallo_numguard.guard.step.pending import PendingStep
from hallo_numguard.guard.step.recorder import Recorder
from hallo_numguard.guard.step.updates import UpdateWatch

ABSURD = 1e15  # absolute value of a weight that no initialisation and no training makes
MAX_HISTORIES = 8  # of weights that one update has written
MAX_OPERATIONS = 8  # that are named as possible causes
_UNKNOWN = -(1 << 20)  # lower than any power of two


@dataclass(frozen=True)
class BadStep:
    """A step whose gradients are not finite, as this rank saw it.

    Attributes:
        pending: State of the step.
        skipped: Number of steps skipped in a row, this one included; 0 if it is applied nevertheless.
        losses: Losses of its micro-batches, or stand-ins for them; see `loss_known`.
        loss_known: Whether `losses` are real losses, not stand-ins made from the model's outputs.
    """

    pending: PendingStep
    skipped: int
    losses: Sequence[torch.Tensor]
    loss_known: bool


class RankView(NamedTuple):
    """One rank's view of a bad step. A rank that holds slices sees its own slices only.

    Attributes:
        weights: Statistics of parameters and buffers and, in the last row, of the loss.
        marks: Two flags of each weight: not finite here in a way that no clean step had, and not finite here before
            any step and before this one. int64 [weights, 2].
        gradients: Statistics of the reduced gradients, one row per parameter.
        state: Statistics of the optimizer state, one row per parameter.
        before_reduction: Statistics of this rank's own gradients, one row per parameter.
        input: First bad tensor of the batch, its micro-batch and samples, and the module that fed it to the model, as
            JSON; None if there is none of either.
        source: Where what is not finite came from, as JSON; None if the step was not watched.
        source_order: `Source.collectives` of it.
        after_the_model: Names of the operations between the model's output and the loss, as JSON; None without any.
        power: Base-2 logarithm of the loss scale at which the last finite steps would have fitted.
        history: History of the first bad weight that can be the cause, as JSON; None if there is none.
        is_sliced: Whether the rank holds slices of each row of `weights`. bool [weights + 1].
        is_cut: Whether model parallelism has cut each row of `weights`, of which parameters come first. bool
            [weights + 1].
        loss_known: Whether there are losses, or stand-ins for them.
        batch_known: Whether the batch is there, unchanged.
        local_known: Whether all gradients were scanned before the reduction.
        local_sum: What no element of this rank's gradients, added up over micro-batches, can exceed.
    """

    weights: ParameterStats
    marks: torch.Tensor
    gradients: ParameterStats
    state: ParameterStats
    before_reduction: ParameterStats
    input: str | None
    source: str | None
    source_order: int
    after_the_model: str | None
    power: int
    history: str | None
    is_sliced: torch.Tensor
    is_cut: torch.Tensor
    loss_known: bool
    batch_known: bool
    local_known: bool
    local_sum: float


@dataclass(frozen=True)
class _SeenInput:
    """A bad tensor of the batch, its micro-batch, numbers of its bad and of all samples, and what fed it."""

    offender: Offender | None = None
    micro_batch: int = 0
    samples: tuple[int, ...] | None = None
    feed: BadFeed | None = None


class BeforeReduction(NamedTuple):
    """Ranks whose gradients were bad before the reduction.

    Attributes:
        ranks: Number of ranks that had bad ones.
        rank_of: Lowest rank with a bad gradient, by position of the parameter.
        rank_sum: See `Evidence`.
    """

    ranks: int
    rank_of: dict[int, int]
    rank_sum: float


class GlobalView(NamedTuple):
    """Combined view of all ranks, the same on each; for tensors held as copies, the view of the lowest bad rank.

    The attributes of `RankView`, with the lowest rank on which each tensor is not finite, and whether every rank has
    its losses and its batch.
    """

    weights: ParameterStats
    weight_ranks: torch.Tensor
    marks: list[list[int]]
    gradients: ParameterStats
    gradient_ranks: torch.Tensor
    state: ParameterStats
    state_ranks: torch.Tensor
    before_reduction: BeforeReduction | None
    loss_known: bool
    batch_known: bool
    input: str | None
    source: str | None
    after_the_model: str | None
    power: int
    history: str | None


class EvidenceCollector:
    """Reads this rank's tensors, and combines the results with those of the other ranks.

    Args:
        model: The guarded model.
        ranks: Ranks that take part.
        batch: Calls of the pending step.
        recorder: Flight recorder of the earlier steps.
        local_gradients: Scans of gradients before the reduction.
        armed: What was seen of the operations of a step that was watched.
        updates: Looks at the weights around each update.
        feeding: Modules that feed the model.

    Attributes:
        weights: All parameters and buffers that are read, those of feeding modules last.
    """

    def __init__(
        self,
        model: GuardedModel,
        ranks: Ranks,
        batch: Batch,
        recorder: Recorder,
        local_gradients: LocalGradients,
        armed: ArmedSteps,
        updates: UpdateWatch,
        feeding: FeedingModules,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._batch = batch
        self._recorder = recorder
        self._feeding = feeding
        self._order = ReadyOrder()
        self._local_gradients = local_gradients
        self._armed = armed
        self._updates = updates
        self._forget()

    def _forget(self) -> None:
        self.weights = [*self._model.parameters, *self._model.buffers, *self._feeding.tensors]
        self._tolerated = ToleratedNonfinites()
        # Weights of this rank that were not finite before any forward pass of ours. Master copies of them are bad
        # because they are.
        self._known: set[int] = set()
        self._absmax = torch.zeros(0)
        self._when = ""

    def parameters_were_added(self) -> None:
        """Begins anew with the model's parameters as they are now; `inspect` is to follow."""
        self.stop()
        self._forget()
        self._order = ReadyOrder()
        self.start()

    def start(self) -> None:
        """Puts hooks on the parameters for the first step: they show in which order gradients become ready.

        Not in a pipeline, where each rank would learn the order of its own stage.
        """
        if self._model.stage is None:
            self._order.learn(self._model.parameters)

    def stop(self) -> None:
        """Removes the hooks from the parameters."""
        self._order.stop()

    def step_is_over(self, applied: bool) -> None:
        """Tolerates from now on what was not finite in an applied step."""
        self._order.stop()
        if applied:
            self._tolerated.clean_step()

    def reported(self, view: RankView) -> None:
        """Remembers what was not finite in a reported step, so that a clean step makes it tolerated."""
        self._tolerated.note(view.weights)

    def inspect(self, when: str) -> Iterator[tuple[Offender, bool]]:
        """Reads this rank's parameters, buffers and optimizer state, outside of a step.

        Args:
            when: When that is, as in "attached".

        Yields:
            Each tensor that is not finite, and whether this rank is the one to report it.
        """
        stats = scan_tensors(self.weights)
        self._tolerated.note(stats)
        self._known = set(stats.bad_positions())
        self._absmax = stats.absmax
        self._when = when
        self._updates.weights_were_read(when, stats)
        for position in stats.bad_positions():
            weight = self.weights[position]
            if weight.kind == "buffer" and stats.counts[position][0] == 0:
                continue  # Inf is how masks are written, and how running minima and maxima begin
            offender = weight.offender(stats, position, self._ranks.rank)
            yield offender, self._is_told_by_this_rank(weight)
        state = self._scan_state()
        for position in state.bad_positions():
            if position in self._known:
                continue
            offender = self._state(state, position, self._ranks.rank)
            yield offender, self._model.sliced_state or self._is_told_by_this_rank(self._model.parameters[position])

    def _is_told_by_this_rank(self, item: NamedTensor) -> bool:
        """Whether no other rank holds the same that tells of it."""
        stage = self._model.stage
        if stage is None:
            return self._ranks.rank == 0 or item.is_shared_out
        return stage.copy == 0 and (stage.number == 0 or item.is_shared_out)

    def absurd_parameters(self) -> list[tuple[str, float]]:
        """Returns names and largest numbers of the absurdly large parameters that `inspect` has seen. Synchronises."""
        both = zip(self.weights, self._absmax.tolist(), strict=False)
        return [(item.name, absmax) for item, absmax in both if item.kind == "parameter" and absmax > ABSURD]

    def agree(self, view: RankView) -> GlobalView:
        """Combines the views of all ranks by a fixed number of reductions of fixed sizes, in which each takes part.

        Nothing else is done here: what fails between two collectives would leave the other ranks waiting.
        """
        ranks, device = self._ranks, self._model.device
        is_cut = view.is_cut[: len(self._model.parameters)]
        weights, weight_ranks = ranks.combine(view.weights, view.is_sliced, view.is_cut)
        gradients, gradient_ranks = ranks.combine(
            view.gradients, _all(view.gradients, self._model.sliced_gradients), is_cut
        )
        state, state_ranks = ranks.combine(view.state, _all(view.state, self._model.sliced_state), is_cut)
        return GlobalView(
            weights,
            weight_ranks,
            ranks.any(view.marks).tolist(),
            gradients,
            gradient_ranks,
            state,
            state_ranks,
            self._agree_before_reduction(view),
            loss_known=ranks.lowest(int(view.loss_known), device) == 1,
            batch_known=ranks.lowest(int(view.batch_known), device) == 1,
            input=ranks.first_text(view.input, device),
            source=ranks.first_text(view.source, device, view.source_order),
            after_the_model=ranks.first_text(view.after_the_model, device),
            power=ranks.lowest(view.power, device),
            history=ranks.first_text(view.history, device),
        )

    def scan(self, step: BadStep) -> RankView:
        """Reads every tensor that this rank holds. What ranks reduce is on the device on which they do."""
        scanned = step.pending.gradients
        gradients = self._stats_of(scanned)
        weights = scan_tensors([*self.weights, self._loss_of_this_rank(step)])
        before = self._local_gradients.stats(self._model.device)
        state, batch = self._scan_state(), self._scan_batch(step)
        source = self._armed.source(step.pending.losses, self._ranks.size == 1)
        return RankView(
            self._on_device(weights),
            self._marks(weights),
            gradients,
            state,
            before,
            batch,
            source_as_text(source, self._ranks.rank, self._model.in_global_names),
            0 if source is None else source.collectives,
            self._names_after_the_model(),
            self._settling_power(),
            self._history(weights),
            is_sliced=self._marked([item.slice is not None for item in self.weights]),
            is_cut=self._marked([item.shard is not None for item in self.weights]),
            loss_known=bool(step.losses),
            batch_known=self._has_batch(step),
            local_known=self._local_gradients.is_watching,
            local_sum=self._local_gradients.largest_sum(),
        )

    def _names_after_the_model(self) -> str | None:
        names = self._batch.operations_after_the_model()[:MAX_OPERATIONS]
        return json.dumps(names) if names else None

    def _marks(self, weights: ParameterStats) -> torch.Tensor:
        marks = torch.zeros((len(self.weights), 2), dtype=torch.int64)
        for position in weights.bad_positions():
            if position < len(self.weights):
                marks[position, 0] = int(not self._tolerated.is_tolerated(weights, position))
                marks[position, 1] = int(self._was_bad_before(position))
        return marks.to(self._model.device)

    def _history(self, weights: ParameterStats) -> str | None:
        """The history of the first weight that can be the cause; of those that are trained, the first written one.

        One whose moments were bad before comes before all.
        """
        positions = [at for at in weights.bad_positions() if at < len(self.weights)]
        able = [
            at
            for at in positions
            if not self._tolerated.is_tolerated(weights, at)
            and self._can_be_origin(weights, at, self._was_bad_before(at))
        ]
        if not able:
            return None
        written = [at for at in able if self._updates.is_written(at)]
        found = self.history_with_bad_moment(written) or self.history((written or able)[0])
        return json.dumps(encode(found), ensure_ascii=False)

    def history(self, position: int) -> WeightHistory:
        """Returns what is known of a weight that is not finite, a parameter or a buffer by position."""
        item, module = self.weights[position], self._model.module
        written = self._updates.history_of(position)
        if written is not None:
            return history_of(written, item, self._updates, self._model.optimizer)
        is_unsaved = item.kind == "buffer" and module is not None and not is_persistent(module, item.tensor)
        return WeightHistory(
            item.name,
            when=self._when,
            was_so=position in self._known,
            is_trained=self._updates.trains(position),
            in_no_file=is_unsaved,
        )

    def history_with_bad_moment(self, positions: Sequence[int]) -> WeightHistory | None:
        """Returns what is known of the first of these weights whose moments were bad before the update that wrote it.

        An update that scales by a norm, as LAMB's, spreads one bad moment over other weights.
        """
        if not positions:
            return None
        are_bad = set(self._scan_state().bad_positions())
        histories = map(self.history, [at for at in positions if at in are_bad][:MAX_HISTORIES])
        return next((item for item in histories if item.update is not None and item.update.has_bad_moment), None)

    def state_offender(self, position: int) -> Offender | None:
        """Returns the optimizer's state of a parameter as an offender; None if it is finite."""
        state = self._scan_state()
        if position not in state.bad_positions():
            return None
        return self._state(state, position, self._ranks.rank)

    def _was_bad_before(self, position: int) -> bool:
        """Whether a weight was not finite before any step, nor, if calls change it, before this step's first call."""
        if position not in self._known:
            return False
        before = self._batch.buffer_before(self.weights[position].tensor)
        return before is None or not bool(before.isfinite().all())

    def _scan_batch(self, step: BadStep) -> str | None:
        losses = [bool(torch.isfinite(loss)) for loss in step.losses]
        found = self._batch.first_nonfinite(self._ranks.rank, losses) if self._has_batch(step) else None
        feed = None if found is None and all(losses) else self._feeding.first_bad(self._ranks.rank)
        if found is None and feed is None:
            return None
        offender, micro_batch = found or (None, 0)
        samples = None if offender is None else self._batch.bad_samples(offender.name, micro_batch)
        seen = _SeenInput(offender, micro_batch, samples, feed)
        return json.dumps(encode(seen), ensure_ascii=False)

    def _has_batch(self, step: BadStep) -> bool:
        """Whether the batch is there, unchanged: of many micro-batches, those of all bad losses."""
        before = self._batch.losses_before(len(step.losses))
        if before is None:
            is_kept = self._model.stage is None and self._batch.calls_before == 0
        else:
            is_kept = all(bool(torch.isfinite(loss)) for loss in step.losses[:before])
        return self._batch.seen and is_kept

    def _settling_power(self) -> int:
        """The loss scale at which the last finite steps would have fitted, as a base-2 logarithm."""
        unscaled = [
            (row.absmax / row.loss_scale, row.limit) for row in self._recorder.read() if row.applied and row.absmax
        ]
        rooms = [math.floor(math.log2(limit / absmax)) for absmax, limit in unscaled if limit is not None]
        return min(rooms, default=_UNKNOWN)

    def _scan_state(self) -> ParameterStats:
        return self._stats_of(self._model.scan_state())

    def _stats_of(self, scanned: ScannedPieces) -> ParameterStats:
        return self._on_device(stats_of(self._model.parameters, scanned.table, scanned.pieces))

    def _on_device(self, stats: ParameterStats) -> ParameterStats:
        """The statistics on the device on which ranks reduce: those of what is offloaded are made on the CPU."""
        return ParameterStats(*[column.to(self._model.device) for column in stats])

    def _agree_before_reduction(self, view: RankView) -> BeforeReduction | None:
        """Statistics of the ranks' own gradients, if all were scanned. A fixed number of reductions in any case."""
        local = view.before_reduction
        all_known = self._ranks.lowest(int(view.local_known), self._model.device) == 1
        is_cut = view.is_cut[: len(self._model.parameters)]
        stats, ranks = self._ranks.combine(local, _all(local, False), is_cut)
        bad = self._ranks.total(int(bool((local.first != NONE).any())), self._model.device)
        local_sum = torch.tensor(view.local_sum, dtype=torch.float64, device=self._model.device)
        rank_sum = float(self._ranks.any(local_sum))
        if not all_known:
            return None
        rank_of = {position: int(ranks[position]) for position in stats.bad_positions()}
        return BeforeReduction(bad, rank_of, rank_sum)

    def _marked(self, weights: Sequence[bool]) -> torch.Tensor:
        """A flag of each weight, and of the loss."""
        return torch.tensor([*weights, False], device=self._model.device)

    def evidence(
        self, step: BadStep, view: GlobalView, before: OverflowReport | None, rank_faults: Mapping[int, int]
    ) -> Evidence:
        """Returns the evidence, with the names of tensors.

        Args:
            step: The bad step.
            view: Combined view of all ranks.
            before: The previous report.
            rank_faults: Step of the last `rank_fault`, by rank.
        """
        suspects: list[Offender] = []
        bystanders: list[Offender] = []
        loss = None
        weight_ranks, state_ranks = view.weight_ranks.tolist(), view.state_ranks.tolist()
        for position in view.weights.bad_positions():
            if position == len(self.weights):
                loss = self._loss_tensor(step).offender(view.weights, position, weight_ranks[position])
                continue
            offender = self.weights[position].offender(view.weights, position, weight_ranks[position])
            is_new, was_known = map(bool, view.marks[position])
            is_suspect = is_new and self._can_be_origin(view.weights, position, was_known)
            (suspects if is_suspect else bystanders).append(offender)
        history = None if view.history is None else decode(WeightHistory, json.loads(view.history))
        if history is not None:  # the weight whose history is known comes first
            first = history.name
            suspects.sort(key=lambda item: item.name != first)
            if not suspects or suspects[0].name != first:
                history = None
        ready = self._order.sort(view.gradients.bad_positions())
        reduced, stage = view.before_reduction, self._model.stage
        # In a pipeline, a stage's bad gradients may have made those of the stages before it bad: above 1 their number
        # shows nothing.
        is_number_known = reduced is not None and (stage is None or reduced.ranks <= 1)
        seen = _SeenInput() if view.input is None else decode(_SeenInput, json.loads(view.input))
        return Evidence(
            step=step.pending.number,
            skipped=step.skipped,
            scaling=step.pending.scaling,
            suspects=suspects,
            bystanders=bystanders,
            state=[
                self._state(view.state, at, state_ranks[at])
                for at in view.state.bad_positions()
                if not view.marks[at][1]
            ],
            input=seen.offender,
            micro_batch=seen.micro_batch,
            bad_samples=None if seen.samples is None else (seen.samples[0], seen.samples[1]),
            input_comes_back=before is not None and before.verdict is Verdict.INPUT_NONFINITE and step.skipped > 1,
            bad_feed=seen.feed,
            batch_known=view.batch_known,
            tensors=sum(item.name not in self._model.unchecked for item in self.weights),
            loss=loss,
            loss_known=view.loss_known,
            loss_shown=step.loss_known,
            gradients=[self._gradient(view, position) for position in ready],
            bad_ranks=reduced.ranks if reduced is not None and is_number_known else None,
            rank_sum=0.0 if reduced is None else reduced.rank_sum,
            copies=None if stage is None else stage.copies,
            world_size=self._ranks.size,
            settles_at=None if view.power == _UNKNOWN else min(2.0**view.power, step.pending.scaling.scale / 2),
            proved_before=_proved_before(before, step),
            rank_faults=dict(rank_faults),
            after_the_model=tuple(json.loads(view.after_the_model or "[]")),
            watched=None if view.source is None else decode(Source, json.loads(view.source)),
            history=history,
        )

    def _can_be_origin(self, weights: ParameterStats, position: int, was_known: bool) -> bool:
        if self.weights[position].kind == "parameter":
            return True
        # A forward pass on a bad batch poisons running statistics: that is damage, unless it was there before. And
        # -Inf alone is how additive masks are written.
        return was_known and not weights.only_negative_infinity(position)

    def _gradient(self, view: GlobalView, position: int) -> Offender:
        item, place = self._model.parameters[position], self._ranks.place
        rank = self._ranks.rank if self._ranks.size == 1 else None  # after the reduction it is every rank's
        is_of_one = item.shard is not None or not item.is_everywhere
        if is_of_one and (place is None or place.copies == 1):
            rank = int(view.gradient_ranks[position])  # that of the part, which is reduced over no other rank
        if view.before_reduction is not None:
            rank = view.before_reduction.rank_of.get(position, rank)
        return replace(item.offender(view.gradients, position, rank), kind="gradient")

    def _state(self, state: ParameterStats, position: int, rank: int) -> Offender:
        return replace(self._model.parameters[position].offender(state, position, rank), kind="optimizer_state")

    def _loss_of_this_rank(self, step: BadStep) -> NamedTensor:
        """The losses, if this rank has made them; finite ones in their place if another stage has."""
        item, stage = self._loss_tensor(step), self._model.stage
        is_told = step.loss_known and stage is not None and not stage.is_last
        return replace(item, tensor=torch.zeros_like(item.tensor)) if is_told else item

    def _loss_tensor(self, step: BadStep) -> NamedTensor:
        """The micro-batches' losses as one tensor, so that the index of an offender is the micro-batch."""
        losses = [loss.reshape(()).to(torch.float32) for loss in step.losses]
        if not losses:
            return NamedTensor("loss", "loss", torch.zeros((), device=self._model.device))
        kind, name = ("loss", "loss") if step.loss_known else ("activation", "output")
        return NamedTensor(kind, name, losses[0] if len(losses) == 1 else torch.stack(losses))


def _all(stats: ParameterStats, value: bool) -> torch.Tensor:
    return torch.full_like(stats.first, int(value), dtype=torch.bool)


def _proved_before(report: OverflowReport | None, step: BadStep) -> float | None:
    """The loss scale that a replay has found finite since the last step that was applied."""
    if report is None or step.skipped < 2 or report.verdict is not Verdict.SCALE_TOO_HIGH or report.provisional:
        return None
    return report.settles_at
