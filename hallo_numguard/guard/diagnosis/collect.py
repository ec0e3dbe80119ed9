"""What the ranks have seen of a bad step, put together: the same evidence on each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.guard import named_tensors as attribution
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis.evidence import Evidence
from hallo_numguard.guard.guarded_model import Model, Scanned
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.named_tensors import (
    LegalNonfinites,
    NamedTensor,
    ReadyOrder,
    bad_positions,
    only_negative_infinity,
)
from hallo_numguard.guard.parameter_stats import NONE, Sums, by_parameter
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.local_gradients import LocalGradients
from hallo_numguard.guard.step.recorder import Recorder

_UNKNOWN = -(1 << 20)  # lower than any power of two


@dataclass(frozen=True)
class Step:
    """A step whose gradients are not finite, as this rank has seen it.

    Attributes:
        number: From 1.
        skipped: Number of steps skipped in a row, this one included; 0 if it is applied all the same.
        scaling: The loss scaler.
        scanned: The gradients.
        losses: Of its micro-batches.
        loss_shown: Whether these are losses, and not what the model returned in their place.
    """

    number: int
    skipped: int
    scaling: LossScaling
    scanned: Scanned
    losses: Sequence[torch.Tensor]
    loss_shown: bool


class Local(NamedTuple):
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


class Agreed(NamedTuple):
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


class Witness:
    """Knows what this rank holds, and puts it together with what the others do.

    Args:
        model: What there is to be named.
        ranks: That take part.
        batch: The calls of the step.
        recorder: The steps before.
        local_gradients: See `GuardConfig`.
    """

    def __init__(self, model: Model, ranks: Ranks, batch: Batch, recorder: Recorder, local_gradients: str) -> None:
        self._model = model
        self._ranks = ranks
        self._batch = batch
        self._recorder = recorder
        self._weights = [*model.parameters, *model.buffers]
        self._legal = LegalNonfinites()
        # Weights of this rank that were not finite before any forward pass of ours. Master copies of them are bad
        # because they are.
        self._known: set[int] = set()
        self._order = ReadyOrder()
        self._order.learn(model.parameters)
        self.local = LocalGradients(model.parameters, local_gradients)

    def stop(self) -> None:
        """Takes hooks off the parameters."""
        self._order.stop()
        self.local.stop()

    def step_is_over(self, applied: bool) -> None:
        """What was not finite in a step that was applied is not to blame later."""
        self._order.stop()
        self.local.step_is_over(clean=applied)
        if applied:
            self._legal.clean_step()

    def reported(self, local: Local) -> None:
        """What was not finite in a step that was reported has been told."""
        self._legal.note(local.weights)

    def inspect(self) -> Iterator[tuple[Offender, bool]]:
        """Looks at what this rank has of parameters, buffers and optimizer state, outside of a step.

        Yields:
            What is not finite, and whether it is for this rank to tell.
        """
        sums = attribution.look(self._weights)
        self._legal.note(sums)
        self._known = set(bad_positions(sums))
        for position in bad_positions(sums):
            weight = self._weights[position]
            if weight.kind == "buffer" and only_negative_infinity(sums, position):
                continue
            offender = weight.offender(sums, position, self._ranks.rank)
            yield offender, self._ranks.rank == 0 or weight.slice is not None
        state = self._look_at_state()
        for position in bad_positions(state):
            if position in self._known:
                continue
            offender = self._state(state, position, self._ranks.rank)
            yield offender, self._ranks.rank == 0 or self._model.sliced_state

    def agree(self, step: Step, local: Local) -> Agreed:
        """A fixed number of reductions of fixed sizes: every rank takes part in each, whatever it has seen."""
        ranks, device = self._ranks, self._model.device
        weights, weight_ranks = ranks.combine(local.weights, self._sliced_weights())
        gradients, _ = ranks.combine(local.gradients, _all(local.gradients, self._model.sliced_gradients))
        state, state_ranks = ranks.combine(local.state, _all(local.state, self._model.sliced_state))
        return Agreed(
            weights,
            weight_ranks,
            ranks.any(local.marks).tolist(),
            gradients,
            state,
            state_ranks,
            self._before_the_reduction(local.before_reduction),
            loss_known=ranks.lowest(int(bool(step.losses)), device) == 1,
            batch_known=ranks.lowest(int(self._batch.seen), device) == 1,
            input=ranks.lowest_told(local.input, device),
            power=ranks.lowest(local.power, device),
        )

    def look(self, step: Step) -> Local:
        """Looks at everything that this rank holds."""
        gradients = by_parameter(step.scanned.packed, step.scanned.pieces, len(self._model.parameters))
        weights = attribution.look([*self._weights, self._loss_tensor(step)])
        before = self.local.sums(self._model.device)
        state, batch = self._look_at_state(), self._look_at_batch(step)
        return Local(weights, self._marks(weights), gradients, state, before, batch, self._settling_power())

    def _marks(self, weights: Sums) -> torch.Tensor:
        marks = torch.zeros((len(self._weights), 2), dtype=torch.int64)
        for position in bad_positions(weights):
            if position < len(self._weights):
                marks[position, 0] = int(not self._legal.is_legal(weights, position))
        marks[list(self._known), 1] = 1
        return marks.to(self._model.device)

    def _look_at_batch(self, step: Step) -> str | None:
        if not self._batch.seen:
            return None
        losses = [bool(torch.isfinite(loss)) for loss in step.losses]
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
        looked = self._ranks.lowest(int(self.local.watching), self._model.device) == 1
        sums, ranks = self._ranks.combine(local, _all(local, False))
        bad = self._ranks.total(int(bool((local.first != NONE).any())), self._model.device)
        if not looked:
            return None
        return BeforeReduction(bad, {position: int(ranks[position]) for position in bad_positions(sums)})

    def _sliced_weights(self) -> torch.Tensor:
        sliced = [item.slice is not None for item in self._weights]
        return torch.tensor([*sliced, False], device=self._model.device)

    def by_its_first_name(self, offender: Offender) -> Offender:
        """A tied weight has one name, whichever of the modules that use it was found."""
        for weight in self._weights:
            if offender.name in weight.aliases:
                return replace(offender, name=weight.name, aliases=weight.aliases)
        return offender

    def evidence(
        self, step: Step, agreed: Agreed, before: OverflowReport | None, rank_faults: Mapping[int, int]
    ) -> Evidence:
        """Says what was seen.

        Args:
            step: The step.
            agreed: What all ranks see of it.
            before: The last report.
            rank_faults: Step of the last `rank_fault` by rank.
        """
        suspects: list[Offender] = []
        bystanders: list[Offender] = []
        loss = None
        weight_ranks, state_ranks = agreed.weight_ranks.tolist(), agreed.state_ranks.tolist()
        for position in bad_positions(agreed.weights):
            if position == len(self._weights):
                loss = self._loss_tensor(step).offender(agreed.weights, position, weight_ranks[position])
                continue
            offender = self._weights[position].offender(agreed.weights, position, weight_ranks[position])
            is_new, was_known = map(bool, agreed.marks[position])
            suspect = is_new and self._may_be_origin(agreed.weights, position, was_known)
            (suspects if suspect else bystanders).append(offender)
        ready = self._order.sort(bad_positions(agreed.gradients))
        reduced = agreed.before_reduction
        bad_input, micro_batch = (None, 0) if agreed.input is None else _read_input(agreed.input)
        return Evidence(
            step=step.number,
            skipped=step.skipped,
            scaling=step.scaling,
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
            loss_shown=step.loss_shown,
            gradients=[self._gradient(agreed.gradients, position, reduced) for position in ready],
            bad_ranks=None if reduced is None else reduced.ranks,
            world_size=self._ranks.size,
            settles_at=None if agreed.power == _UNKNOWN else min(2.0**agreed.power, step.scaling.scale / 2),
            proved_before=_proved_before(before, step),
            rank_faults=dict(rank_faults),
        )

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

    def _loss_tensor(self, step: Step) -> NamedTensor:
        """The micro-batches' losses as one tensor, so that the index of an offender is the micro-batch."""
        losses = [loss.reshape(()).to(torch.float32) for loss in step.losses]
        if not losses:
            return NamedTensor("loss", "loss", torch.zeros((), device=self._model.device))
        kind, name = ("loss", "loss") if step.loss_shown else ("activation", "output")
        return NamedTensor(kind, name, losses[0] if len(losses) == 1 else torch.stack(losses))


def _all(sums: Sums, value: bool) -> torch.Tensor:
    return torch.full_like(sums.first, int(value), dtype=torch.bool)


def _proved_before(report: OverflowReport | None, step: Step) -> float | None:
    """The loss scale that a replay has named since the last step that was applied."""
    if report is None or step.skipped < 2 or report.verdict is not Verdict.SCALE_TOO_HIGH or report.provisional:
        return None
    return report.settles_at


def _read_input(told: str) -> tuple[Offender, int]:
    document, micro_batch = json.loads(told)
    return Offender.from_document(document), micro_batch
