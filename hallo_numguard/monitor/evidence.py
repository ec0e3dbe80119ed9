"""What was seen in a step, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hallo_numguard.monitor.replay import Replayed
from hallo_numguard.records import Offender


@dataclass(frozen=True)
class Scaling:
    """The loss scaler, before it was told about this overflow.

    Attributes:
        scale: In force during the backward pass.
        dynamic: Whether it is lowered on an overflow.
        minimum: The lowest it will go to.
        patience: Number of overflows that it will let pass before it is lowered (hysteresis).
        scaler: Who scales.
        at_last: What it does where the scale cannot be lowered any more.
    """

    scale: float
    dynamic: bool
    minimum: float = 1.0
    patience: int = 0
    scaler: str = "DeepSpeed"
    at_last: str = "give up"

    @property
    def halvings_left(self) -> int:
        """How often the scale can still be halved."""
        return round(math.log2(self.scale / self.minimum)) if self.can_fall else 0

    @property
    def can_fall(self) -> bool:
        """Whether a lower scale will be tried next."""
        return self.dynamic and self.scale > self.minimum

    def __str__(self) -> str:
        return f"2^{math.log2(self.scale):g} ({self.scale:g})" if self.scale > 0 else f"{self.scale:g}"


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
    scaling: Scaling
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
        return None if self.replay is None or self.replay.why_not else self.replay
