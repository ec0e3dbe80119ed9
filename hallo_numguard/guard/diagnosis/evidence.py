"""Value types of the diagnosis: the evidence on a bad step, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hallo_numguard.core.records import Offender
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.diagnosis.weight_history import WeightHistory
from hallo_numguard.guard.feeding_modules import BadFeed
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.stages import LostBetween

WATCHED = "this step, which was watched operation by operation"


@dataclass(frozen=True)
class Replayed:
    """Result of a replay, the same on every rank.

    Attributes:
        failure_reason: Why there is no answer; "" if there is one.
        micro_batch: Position of the micro-batch that was run again last.
        origin: First place that turned non-finite, on the lowest rank where one did; None if none did.
        source: Operation, weight or input that what is not finite came from; None if operations were not watched.
        details: Sentences about the origin.
        bad_ranks: Number of ranks on which the pass was not finite.
        differing_rank: Lowest rank on which the model's output differed from the original one.
        is_close: Whether the model's output was nearly the same as before, but not the same bits.
        is_one_ranks_fault: Whether one rank of several was wrong once: run again twice, it was finite, the same bits
            both times, and every other rank gave what it had given before.
        gradient_sum: Sum over micro-batches and ranks of the largest gradient that each had: no element of the reduced
            gradients can be larger.
        rank_sum: The largest such sum of one rank alone.
        settles_at: Highest loss scale at which the batch was finite when it was tried; None if none was tried.
        finite_unscaled: Whether the batch was finite without loss scaling; None if that was not tried.
        is_whole_step: Whether it was not the model alone that was run again, but the function that makes the loss.
        only_compiled: Whether the model gave the same again, compiled, and something else eagerly.
        came_from_the_loss: Whether the gradient that arrived at the model's output was not finite.
        number: Number of earlier calls of the origin's module in the same pass.
    """

    failure_reason: str = ""
    micro_batch: int = 0
    origin: Offender | None = None
    source: Source | None = None
    details: tuple[str, ...] = ()
    bad_ranks: int = 0
    differing_rank: int = 0
    is_close: bool = False
    is_one_ranks_fault: bool = False
    gradient_sum: float = 0.0
    rank_sum: float = 0.0
    settles_at: float | None = None
    finite_unscaled: bool | None = None
    is_whole_step: bool = False
    only_compiled: bool = False
    came_from_the_loss: bool = False
    number: int = 0

    @property
    def known_from(self) -> str:
        """What has shown the source."""
        return "the whole step, run again" if self.is_whole_step else "the batch, run again"


@dataclass(frozen=True)
class Evidence:
    """Evidence on a bad step, the same on every rank.

    Attributes:
        step: Number of the step, from 1.
        skipped: Number of steps skipped in a row, this one included; 0 if it is applied nevertheless.
        scaling: State of the loss scaler.
        suspects: Non-finite parameters and buffers that can be the cause, in dataflow order.
        bystanders: Non-finite parameters and buffers that are not the cause: a clean step was seen with them in place,
            they hold nothing but -Inf on purpose, or this very step may have poisoned them.
        state: Parameters whose optimizer state (moments, master copy) is not finite.
        input: First non-finite tensor of the batch that can be the cause.
        micro_batch: Position of that tensor's micro-batch in the step, from 0.
        batch_known: Whether the guard saw the arguments of the model.
        tensors: Number of parameters and buffers that were scanned.
        loss: The loss as an offender; None if it is finite.
        loss_known: Whether the guard saw the loss or, in its place, the model's output.
        loss_shown: Whether `loss` is the loss itself, and not the model's output.
        gradients: Offending gradients in ready order.
        bad_ranks: Number of ranks whose gradients were not finite before the reduction; None if unknown.
        rank_sum: What no element of a rank's own gradients, added up over micro-batches, can exceed, as they were
            scanned before the reduction.
        world_size: Number of ranks.
        copies: Number of ranks whose gradients of one parameter are added up; None for all.
        settles_at: Loss scale up to which the gradients of the last finite steps would have fitted, or half of the
            present one if that is lower; None if no step was finite yet.
        proved_before: Loss scale at which a batch was finite that was skipped since the last step that was applied.
        rank_faults: Step of the last `rank_fault`, by rank.
        after_the_model: Names of the operations between the model's output and the loss, the likeliest cause first.
        watched: Where what is not finite came from, if the step was watched operation by operation; else None.
        replay: Result of running the batch again; None if it was not run.
        alone_because: Why this rank has judged by itself, without the others; "" if it has not.
        history: Who wrote the first of `suspects`, as far as that is known; None if nothing is.
        bad_samples: Number of samples of the input that are not finite, and of all of them; None if unknown.
        input_comes_back: Whether the step before was skipped because of an input as well.
        bad_feed: First module outside of the model, of those that feed it, that made a non-finite value.
        not_kept: Number of the first micro-batches of a pipeline's step that are not kept, and had finite losses.
        calls_before: Number of the step's calls of the model before those that are kept, from which the micro-batches
            of `input`, `replay` and `lost_between` are counted.
        lost_between: Stages of a pipeline between which the batch became non-finite; None if it did not.
    """

    step: int
    skipped: int
    scaling: LossScaling
    suspects: Sequence[Offender]
    bystanders: Sequence[Offender]
    state: Sequence[Offender]
    input: Offender | None
    micro_batch: int
    batch_known: bool
    tensors: int
    loss: Offender | None
    loss_known: bool
    gradients: Sequence[Offender]
    bad_ranks: int | None
    world_size: int
    settles_at: float | None
    loss_shown: bool = True
    proved_before: float | None = None
    rank_faults: Mapping[int, int] = field(default_factory=dict)
    after_the_model: Sequence[str] = ()
    watched: Source | None = None
    replay: Replayed | None = None
    alone_because: str = ""
    history: WeightHistory | None = None
    bad_samples: tuple[int, int] | None = None
    input_comes_back: bool = False
    bad_feed: BadFeed | None = None
    lost_between: LostBetween | None = None
    copies: int | None = None
    not_kept: int = 0
    calls_before: int = 0
    rank_sum: float = 0.0

    def with_first_losses(self, count: int) -> Evidence:
        """Returns the same with so many finite losses before those that are kept, for the index of a bad one."""
        if not count or self.loss is None or not self.loss.index:
            return replace(self, not_kept=count)
        numel = self.loss.numel + count
        loss = replace(self.loss, index=(self.loss.index[0] + count,), numel=numel, shape=(numel,))
        return replace(self, loss=loss, not_kept=count)

    @property
    def answer(self) -> Replayed | None:
        """The result of the replay, if it has one."""
        return None if self.replay is None or self.replay.failure_reason else self.replay

    @property
    def source(self) -> Source | None:
        """Where what is not finite came from, if that was followed."""
        replayed = None if self.answer is None else self.answer.source
        return replayed or self.watched

    @property
    def known_from(self) -> str:
        """What has shown the source."""
        return WATCHED if self.answer is None or self.answer.source is None else self.answer.known_from
