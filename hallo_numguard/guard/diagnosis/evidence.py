"""What was seen in a step, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hallo_numguard.core.records import Offender
from hallo_numguard.guard.loss_scaling import LossScaling


@dataclass(frozen=True)
class Replayed:
    """What all ranks found together, the same on each.

    Attributes:
        failure_reason: Why there is no answer; "" if there is one.
        micro_batch: Which of the step's was made again, the last one of those that were.
        origin: Where it turned non-finite on the lowest rank where it did; None if it did nowhere.
        details: About the origin, in sentences.
        bad_ranks: Number of ranks on which it was not finite.
        differing_ranks: Number of ranks on which the model returned something else than before.
        differing_rank: The lowest of them.
        settles_at: The highest loss scale at which the batch was finite when it was tried; None if it was not tried.
        finite_unscaled: Whether it was finite without any loss scaling; None if that was not tried.
        number: How often the module of `origin` had been called before in the same pass.
    """

    failure_reason: str = ""
    micro_batch: int = 0
    origin: Offender | None = None
    details: tuple[str, ...] = ()
    bad_ranks: int = 0
    differing_ranks: int = 0
    differing_rank: int = 0
    settles_at: float | None = None
    finite_unscaled: bool | None = None
    number: int = 0


@dataclass(frozen=True)
class Evidence:
    """What was seen in the step, the same on every rank.

    Attributes:
        step: Number of the step, from 1.
        skipped: Number of steps skipped in a row, this one included; 0 if it is applied all the same.
        scaling: The loss scaler.
        suspects: Non-finite parameters and buffers that may be the cause, in dataflow order.
        bystanders: Non-finite ones that are not: a clean step was seen with them in place, they hold nothing but -Inf
            on purpose, or they may have been poisoned by this very step.
        state: Parameters whose optimizer state (moments, master copy) is not finite.
        input: The first non-finite tensor of the batch that may be the cause.
        micro_batch: Of the step, in which it was, from 0.
        batch_known: False if the guard could not see what the model was called with.
        tensors: Number of parameters and buffers that were looked at.
        loss: The loss as an offender; None if it is finite.
        loss_known: False if the guard could see neither the loss nor, in its place, what the model returned.
        loss_shown: False if `loss` is about what the model returned.
        gradients: Offending gradients in ready order.
        bad_ranks: Number of ranks whose gradients were not finite before the reduction; None if nobody looked.
        world_size: Number of ranks.
        settles_at: The loss scale up to which the gradients of the last finite steps would have fitted, or half of the
            present one if that is lower; None if no step was finite yet.
        proved_before: The loss scale at which a batch was finite that was skipped since the last step that was applied.
        rank_faults: Step of the last `rank_fault` by rank.
        replay: What the batch has shown when it was run again; None if it was not.
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
    replay: Replayed | None = None

    @property
    def answer(self) -> Replayed | None:
        """What the batch has shown when it was run again, if it was the same."""
        return None if self.replay is None or self.replay.failure_reason else self.replay
