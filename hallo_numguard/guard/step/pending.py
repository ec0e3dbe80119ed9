"""State of one step until it is over, and its one owner."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from hallo_numguard.guard.feeding_modules import MAX_CALLS as MAX_FEEDING_CALLS
from hallo_numguard.guard.feeding_modules import FeedingCall
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.step.model_call import ModelCall
from hallo_numguard.guard.step.step_call import StepCall
from hallo_numguard.ops.table import StatsTable
from hallo_numguard.tracing.watch import OperationWatch

MAX_CALLS = 64  # of a step: forward passes that no step follows must not pile up


@dataclass(eq=False)
class PendingStep:
    """State of one step until it is known whether it was clean.

    Attributes:
        number: Number of the step, from 1.
        scaling: State of the loss scaler.
        gradients: Scan of this rank's gradients.
        is_scanned: Whether there is such a scan.
        losses: Losses of the micro-batches, detached.
        loss_node: Autograd node of the last loss; None if it was not seen with one.
        losses_are_scaled: Whether they are still multiplied by the loss scale.
        losses_are_roots: Whether they are the roots of backward passes, and were not shown by a framework or a script.
        losses_of_backward: Whether backward was called on them, so that they are what the gradients come from.
        calls: The last calls of the model, one per micro-batch.
        calls_before: Number of the step's calls before those.
        step_calls: Calls of the function that makes the loss, if it is known.
        alone_because: Why this rank judges the step by itself; "" if it does not.
        watch: What was seen of its operations, if it was armed.
        local_gradients: Statistics of each gradient before the reduction, and the parameter that it belongs to.
        feeding_calls: Calls of modules that feed the model.
    """

    number: int = 0
    scaling: LossScaling = UNSCALED
    gradients: ScannedPieces = field(default_factory=lambda: ScannedPieces(StatsTable.empty(), ()))
    is_scanned: bool = False
    losses: list[torch.Tensor] = field(default_factory=list)
    loss_node: Any = None
    losses_are_scaled: bool = False
    losses_are_roots: bool = False
    losses_of_backward: bool = False
    calls: deque[ModelCall] = field(default_factory=lambda: deque(maxlen=MAX_CALLS))
    calls_before: int = 0
    step_calls: list[StepCall] = field(default_factory=list)
    alone_because: str = ""
    watch: OperationWatch | None = None
    local_gradients: list[tuple[StatsTable, Piece]] = field(default_factory=list)
    feeding_calls: deque[FeedingCall] = field(default_factory=lambda: deque(maxlen=MAX_FEEDING_CALLS))

    def add_call(self, call: ModelCall) -> None:
        """Keeps a call of the model, in place of the first one if there are many."""
        self.calls_before += int(len(self.calls) == MAX_CALLS)
        self.calls.append(call)

    def forget_losses(self) -> None:
        """Forgets the losses: they are not those of this step."""
        self.losses.clear()
        self.loss_node = None
        self.losses_are_scaled = self.losses_are_roots = self.losses_of_backward = False

    def unscale_losses(self) -> None:
        """Divides the losses by the loss scale, if they are multiplied by it. No host sync."""
        if self.losses_are_scaled and self.scaling.scale != 1.0:
            self.losses[:] = [loss / self.scaling.scale for loss in self.losses]
        self.losses_are_scaled = False

    def clear(self) -> None:
        """Releases the tensors: the step is over."""
        self.is_scanned = False
        self.forget_losses()
        self.calls.clear()
        self.calls_before = 0
        self.step_calls.clear()
        self.local_gradients.clear()
        self.feeding_calls.clear()
        self.alone_because = ""
        self.watch = None


class StepOwner:
    """Owner of the pending step, through which everything about it is written and read.

    A step can be put aside, and completed or explained when the next one's backward pass is over and its own result
    has arrived without a host sync.

    Attributes:
        pending: The step under way.
    """

    def __init__(self) -> None:
        self.pending = PendingStep()

    def swap(self, step: PendingStep) -> PendingStep:
        """Switches to another step; returns the previous one."""
        before, self.pending = self.pending, step
        return before
