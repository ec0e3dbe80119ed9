"""Reports on steps whose loss is not finite though their gradients are, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, StepRecord, Verdict
from hallo_numguard.core.safe_text import listed
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.diagnosis.evidence import WATCHED, Replayed
from hallo_numguard.guard.diagnosis.remedies import remedy
from hallo_numguard.guard.diagnosis.source_messages import summary_of, what_it_made, with_operation


@dataclass(frozen=True)
class BadLoss:
    """A loss that was not finite in a step that was applied.

    Attributes:
        micro_batches: Positions of the losses that were not finite; () if the losses are not there any more.
        count: Number of losses of the step; 0 if they are not there any more.
        value: The loss, or the first bad one, as "NaN".
        output: What the model returned that was not finite, if it is more than one number; None if nothing was, or if
            that is not known.
        outputs_known: Whether all that the model returned is still there, and was looked at.
        input: First tensor that the model was called with that was not finite.
        inputs_known: Whether all that the model was called with is still there, unchanged, and was looked at.
        labels: Labels of which every element is the same ignored number: name, number and how many elements.
        is_scaled: Whether the loss scale may have made it infinite.
        calls_before: Number of the step's calls of the model before those from which the micro-batch of `replay` is
            counted.
        replay: Result of running the batch again; None if it was not run.
        watched: Where it came from, if the step was watched operation by operation; else None.
    """

    micro_batches: tuple[int, ...] = ()
    count: int = 0
    value: str = "not finite"
    output: Offender | None = None
    outputs_known: bool = False
    input: Offender | None = None
    inputs_known: bool = False
    labels: tuple[tuple[str, int, int], ...] = ()
    is_scaled: bool = False
    calls_before: int = 0
    replay: Replayed | None = None
    watched: Source | None = None

    @property
    def source(self) -> Source | None:
        """Where it came from; None if that was not followed."""
        replayed = None if self.replay is None or self.replay.failure_reason else self.replay.source
        return replayed or self.watched

    @property
    def known_from(self) -> str:
        """What has shown the source; "" if nothing has."""
        if self.source is None:
            return ""
        return WATCHED if self.replay is None or self.replay.source is None else self.replay.known_from

    @property
    def origin(self) -> Offender | None:
        """The place in the model where it was made; None if the replay has not shown it."""
        return None if self.replay is None or self.replay.failure_reason else self.replay.origin

    @property
    def is_of_the_model(self) -> bool:
        """Whether the forward pass has made it, in a call that returns more than the loss."""
        return self.output is not None and self.origin is not None and self.origin.kind == "activation"


def loss_report(row: StepRecord, bad: BadLoss, in_a_row: int, loss: Offender, world_size: int) -> OverflowReport:
    """Returns the report on a step that was applied with a loss that is not finite.

    Args:
        row: Figures of the step.
        bad: What is known of the loss.
        in_a_row: Number of such steps in a row, this one included.
        loss: The loss as an offender.
        world_size: Number of ranks.
    """
    here = f" on rank {loss.rank}" if world_size > 1 else ""
    return OverflowReport(
        step=row.step,
        loss_scale=row.loss_scale,
        verdict=Verdict.FORWARD_NONFINITE if bad.is_of_the_model else Verdict.LOSS_NONFINITE,
        provisional=False,
        recoverable=None,
        first=_first(bad, loss),
        offenders=(),
        evidence=tuple(_evidence(row, bad, in_a_row)),
        not_checked=tuple(_not_checked(bad)),
        advice=_advice(row, bad, world_size),
        world_size=world_size,
        consecutive_skips=0,
        happened=_happened(row, bad, here),
        known_from=bad.known_from,
    )


def _first(bad: BadLoss, loss: Offender) -> Offender:
    found = (bad.origin if bad.is_of_the_model else bad.output) or loss
    return found if bad.source is None else with_operation(found, bad.source)


def _happened(row: StepRecord, bad: BadLoss, here: str) -> str:
    is_whole_step = bad.replay is not None and bad.replay.is_whole_step
    cause = "" if bad.source is None else f": {summary_of(bad.source, is_whole_step)}"
    return f"Step {row.step} was applied with a loss that is {bad.value}{here}, its gradients are finite{cause}."


def _evidence(row: StepRecord, bad: BadLoss, in_a_row: int) -> list[str]:
    lines = [
        "every gradient of the step is 0" if row.absmax == 0 else f"all gradients are finite, up to {row.absmax:.4g}"
    ]
    if bad.count > 1:
        places = listed([str(place) for place in bad.micro_batches])
        share = f"{len(bad.micro_batches)} of {bad.count} losses of the step"
        lines.insert(0, f"{share} are not finite: number {places}, counted from 0")
    if bad.is_scaled:
        lines.append("the loss was multiplied by the loss scale before it was seen")
    lines += [
        f"{name}, with which the model was called: every one of its {count} elements is {number}"
        for name, number, count in bad.labels
    ]
    if bad.output is not None:
        lines.append(f"what the model returned is not finite: {bad.output}")
    elif bad.outputs_known:
        lines.append("no NaN or +Inf in what the model returned, the loss left out")
    if bad.input is not None:
        lines.append(f"what the model was called with is not finite: {bad.input}")
    elif bad.inputs_known:
        lines.append("no NaN or +Inf in what the model was called with")
    lines += _replay_lines(bad)
    lines.append(
        "the step was applied, as gradients that are 0 change weights only by momentum and weight decay"
        if row.absmax == 0
        else "the step was applied, as its gradients are finite"
    )
    if in_a_row > 1:
        lines.append(f"{in_a_row} steps in a row with such a loss")
    return lines


def _replay_lines(bad: BadLoss) -> list[str]:
    if bad.source is not None:
        return [what_it_made(bad.source)] if bad.source.kind == "operation" else []
    if bad.replay is None:
        return []
    if bad.replay.failure_reason:
        return [f"no answer from running the batch again: {bad.replay.failure_reason}"]
    if bad.origin is None:
        return ["the same batch, run again, was finite in every module: the loss was made so after the model"]
    return [
        f"the batch (micro-batch {bad.replay.micro_batch + bad.calls_before}), run again, was not finite either",
        *bad.replay.details,
    ]


def _not_checked(bad: BadLoss) -> Sequence[str]:
    missing = []
    if not bad.outputs_known:
        missing.append("what the model returned")
    if not bad.inputs_known:
        missing.append("what the model was called with")
    if not bad.labels and not bad.is_of_the_model and bad.source is None:
        missing.append("labels that the model was not called with")
    return missing


def _advice(row: StepRecord, bad: BadLoss, world_size: int) -> str:
    if bad.labels and bad.value == "NaN":
        name, number, _ = bad.labels[0]
        default = ", which losses of torch ignore" if number == -100 else ""
        return (
            f"Every element of {name} is {number}{default}: if these are the labels, and {number} is ignored, the mean "
            "is 0 / 0. Look for samples whose answer was cut off (a prompt that fills the context), and drop such "
            "batches, or divide by at least 1."
        )
    if bad.source is not None and bad.source.kind == "operation":
        return remedy(bad.source)
    if bad.is_of_the_model and bad.origin is not None:
        where = f"module {bad.origin.name}" if bad.origin.module else "the root module's own code"
        return (
            f"The forward pass made it in {where}, and no gradient has shown it. Look there for a logarithm, a power "
            f"or a root of a negative number, for a division by 0, and for numbers too large for {bad.origin.dtype}."
        )
    if bad.output is not None:
        return (
            "The forward pass made it before the loss was computed, and no gradient has shown it. Look in the model "
            "for a logarithm, a power or a root of a negative number, for a division by 0, and for numbers too large "
            f"for {bad.output.dtype}; hallo_numguard.trace names the operation."
        )
    if row.absmax == 0:
        return (
            "No valid label? A mean over no element is 0 / 0, and its gradients are 0: look at the labels of the batch "
            "(all ignored, as -100), and at masks and weights of the loss that are 0 throughout."
        )
    if world_size > 1 and bad.value == "NaN" and not bad.labels:
        return (
            "Gradients are those of all ranks together, so that gradients of 0 on this one do not show. No valid label "
            "in its batch? A mean over no element is 0 / 0: look at its labels (all ignored, as -100), then at the "
            "terms of the loss one by one, for a logarithm or a division in a term that is detached or constant."
        )
    return (
        "Something that the gradients do not show made the loss so: look at the terms of the loss one by one, for a "
        "logarithm or a division in a term that is detached or constant, and for one of several losses that is not "
        "finite."
    )


def short_line(row: StepRecord, bad: BadLoss, in_a_row: int) -> str:
    """Returns the finding on such a step, in one line."""
    gradients = "finite (all zero)" if row.absmax == 0 else "finite"
    cause = ""
    if bad.labels:
        cause = f": every element of {bad.labels[0][0]} is {bad.labels[0][1]}"
    elif bad.output is not None:
        cause = "; what the model returned is not finite either"
    elif row.absmax == 0:
        cause = ": no valid label?"
    again = f" ({in_a_row} steps in a row)" if in_a_row > 1 else ""
    return f"step {row.step}: loss {bad.value}, gradients {gradients}{cause}{again}"


def uncleared_line(step: int, since: int, count: int) -> str:
    """Returns the finding on gradients that nobody has cleared after a bad step, in one line."""
    again = "" if count == 1 else f" ({count} steps so far)"
    return (
        f"step {step}: gradients are not finite before the backward pass: since step {since} they were never cleared, "
        f"so that whatever is added to them is lost. Call zero_grad() also where no step is made{again}"
    )
