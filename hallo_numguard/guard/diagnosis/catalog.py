"""The verdicts: evidence and meaning of each. The tables in the docs are generated from it."""

from __future__ import annotations

from typing import NamedTuple

from hallo_numguard.core.records import Verdict


class Entry(NamedTuple):
    """Evidence for a verdict, and its meaning for the run.

    Attributes:
        seen: The evidence, in a sentence without a full stop.
        recoverable: True if training goes on by itself, False if nothing but a repair helps, None if unknown.
    """

    seen: str
    recoverable: bool | None


CATALOG = {
    Verdict.WEIGHTS_NONFINITE: Entry(
        "a parameter or buffer (frozen ones too) made the loss, or the gradients, non-finite", False
    ),
    Verdict.UPDATE_NONFINITE: Entry(
        "weight and gradient were finite before the optimizer's update and the weight is not after it; step, parameter "
        "group and settings are named",
        False,
    ),
    Verdict.OPTIMIZER_STATE_NONFINITE: Entry(
        "the same, and a moment or master copy of that weight is bad too: the optimizer wrote it", False
    ),
    Verdict.INPUT_NONFINITE: Entry(
        "a tensor of the batch is bad; argument, sample, micro-batch and rank are named, and this step is lost. Also "
        "a tensor made before the model was called that the loss was computed with, as weights of classes",
        True,
    ),
    Verdict.FORWARD_NONFINITE: Entry(
        "an operation inside of the model returned NaN or Inf, though what it was given was finite, whether or not the "
        "loss sees it: module, operation, line and sample are named. Also if only the compiled model does so",
        None,
    ),
    Verdict.LOSS_NONFINITE: Entry(
        "the same in code after the model, which computes the loss; also a loss that is not finite while gradients are",
        None,
    ),
    Verdict.SCALE_TOO_HIGH: Entry(
        "in the replay, the batch is finite at a lower loss scale, which is named; where it cannot be run again, the "
        "loss is finite and the scale can still fall: provisional until a step is finite",
        True,
    ),
    Verdict.BACKWARD_NONFINITE: Entry(
        "forward pass and loss are finite, an operation of the backward pass is not: the operation whose backward pass "
        "it is, and its line, are named, or the module, or the code after the model",
        None,
    ),
    Verdict.REDUCTION_OVERFLOW: Entry("gradients are finite on every rank, their sum is not", True),
    Verdict.RANK_FAULT: Entry(
        "of several ranks one only is bad; run again twice, it is finite, with the same bits both times, and nothing "
        "from outside of the model contributed. Unrecoverable if it comes back on that rank within 100 steps",
        None,
    ),
    Verdict.UNDETERMINED: Entry(
        "anything else: the report says what was checked and what was not. Also a loss that the code after the model "
        "made so, until its operation is known",
        None,
    ),
}
