"""A report for each verdict: the evidence in sentences, and advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.core.safe_text import listed
from hallo_numguard.guard.diagnosis import update_messages
from hallo_numguard.guard.diagnosis.catalog import CATALOG
from hallo_numguard.guard.diagnosis.evidence import Evidence
from hallo_numguard.guard.diagnosis.weight_history import WeightHistory
from hallo_numguard.guard.feeding_modules import BadFeed
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.stages import Figures, LostBetween

RANK_FAULT_MEMORY = 100  # steps in which a second fault of the same rank is not taken for chance


def report(
    seen: Evidence,
    verdict: Verdict,
    first: Offender | None,
    evidence: Sequence[str],
    not_checked: Sequence[str],
    advice: str,
    settles_at: float | None = None,
    summary: str = "",
) -> OverflowReport:
    """Returns a report with the lines that all of them have.

    Args:
        seen: The evidence.
        verdict: Cause of the overflow.
        first: The first offender.
        evidence: Sentences on the cause.
        not_checked: Checks that a complete answer would have needed.
        advice: Sentence on what to do.
        settles_at: See `OverflowReport`.
        summary: See `OverflowReport`.
    """
    return OverflowReport(
        step=seen.step,
        loss_scale=seen.scaling.scale,
        verdict=verdict,
        provisional=verdict is Verdict.SCALE_TOO_HIGH and (seen.answer is None or seen.answer.settles_at is None),
        recoverable=CATALOG[verdict].recoverable,
        first=first,
        offenders=tuple(seen.gradients),
        evidence=(*evidence, *_replay_lines(seen), *_common(seen)),
        not_checked=tuple(not_checked),
        advice=advice,
        world_size=seen.world_size,
        consecutive_skips=seen.skipped,
        settles_at=settles_at,
        summary=summary,
    )


def _replay_lines(seen: Evidence) -> list[str]:
    replay = seen.replay
    if replay is None:
        return []
    on_every_rank = " on every rank" if seen.world_size > 1 else ""
    if seen.loss is not None and replay.is_one_ranks_fault:
        return []
    if replay.only_compiled:
        return []
    if replay.failure_reason:
        return [f"no answer from running the batch again: {replay.failure_reason}"]
    if replay.origin is None and replay.source is None:
        nearly = ", though not bit for bit what it was before" if replay.is_close else ""
        return [f"the same batch, run again{on_every_rank}, was finite in every module{nearly}"]
    where = f"on {replay.bad_ranks} of {seen.world_size} ranks" if seen.world_size > 1 else "either"
    what = "step" if replay.is_whole_step else "batch"
    lines = [f"the {what} (micro-batch {replay.micro_batch + seen.calls_before}), run again, was not finite {where}"]
    if replay.source is None:
        lines += replay.details
    if replay.finite_unscaled:
        lines.append("the same batch without loss scaling was finite")
    elif replay.finite_unscaled is False and seen.scaling.scale != 1.0:
        lines.append("nor was it without loss scaling")
    return lines


def _common(seen: Evidence) -> list[str]:
    lines = [_gradient_line(seen), *_scaled_together(seen)]
    if seen.alone_because:
        lines.append(f"this rank has judged by itself: {seen.alone_because}")
    if seen.bystanders:
        names = listed([f"{item.name} ({item.counts})" for item in seen.bystanders])
        lines.append(f"also not finite, but not shown to be the cause: {names}")
    if seen.bad_ranks and seen.world_size > 1:
        lines.append(_rank_line(seen, seen.bad_ranks))
    if seen.state:
        names = ", ".join(item.name for item in seen.state[:3])
        lines.append(f"not finite in the optimizer's state: {names}")
    if seen.skipped > 1:
        lines.append(f"{seen.skipped} steps skipped in a row")
    if seen.skipped == 0:
        lines.append(
            "the step is applied all the same: the configuration switches the check off (policy.enforce skips it)"
        )
    return lines


def _rank_line(seen: Evidence, bad_ranks: int) -> str:
    if bad_ranks == seen.world_size:
        return "before the reduction the gradients of every rank were not finite: the cause is one they share"
    ranks = sorted({item.rank for item in seen.gradients if item.rank is not None})
    whose = f" (rank {ranks[0]})" if len(ranks) == 1 else ""
    line = f"before the reduction the gradients of {bad_ranks} of {seen.world_size} ranks were not finite{whose}"
    is_of_all = seen.copies is not None  # the batch, in a pipeline
    return line if is_of_all else f"{line}: look at that rank's batch first, then at its hardware"


def _gradient_line(seen: Evidence) -> str:
    if not seen.gradients:
        return "every gradient element is finite"
    nan = sum(item.nan for item in seen.gradients)
    inf = sum(item.pos_inf + item.neg_inf for item in seen.gradients)
    tensors = plural(len(seen.gradients), "gradient")
    return f"{tensors} not finite: {nan} NaN and {inf} Inf in all"


def _finite_weights(seen: Evidence) -> str:
    return f"all {seen.tensors} parameters and buffers that count are finite"


def weights_nonfinite(seen: Evidence) -> OverflowReport:
    """A weight was bad before the step."""
    first = seen.suspects[0]
    bad = len(seen.suspects)
    names = listed([item.name for item in seen.suspects])
    are = "is" if bad == 1 else "are"
    tensors = plural(bad, "weight tensor")
    evidence = [
        f"{the_loss(seen)} is not finite ({loss_text(seen)}), and {tensors} of {seen.tensors} {are} not: {names}"
    ]
    if seen.scaling.dynamic:
        overflows = seen.scaling.halvings_left + seen.scaling.patience
        evidence.append(
            f"the loss scale cannot help: {seen.scaling.scaler} would skip {plural(overflows, 'step')} on the way from "
            f"{seen.scaling.scale:g} down to {seen.scaling.minimum:g}, and then {seen.scaling.at_minimum}"
        )
    evidence += update_messages.other_lines(seen.history)
    advice = update_messages.repair(seen.history, first)
    may_be_loaded = seen.history is None or seen.history.was_so
    if may_be_loaded and first.pos_inf + first.neg_inf and first.dtype in ("float16", "bfloat16", "float8_e5m2"):
        advice += (
            f" A number too large for {first.dtype} also becomes Inf when it is converted, so look at the values in "
            f"the file's own dtype."
        )
    return report(seen, Verdict.WEIGHTS_NONFINITE, first, evidence, (), advice, summary=_holds(first))


def update_nonfinite(seen: Evidence, first: Offender, history: WeightHistory) -> OverflowReport:
    """An update of the optimizer before this step wrote the weight."""
    loss = "is finite" if seen.loss is None else f"is not finite ({loss_text(seen)})"
    names = listed([item.name for item in seen.suspects])
    evidence = [
        f"made by the update of step {history.by_update}",
        f"{the_loss(seen)} {loss}; {len(seen.suspects)} of {seen.tensors} weight tensors are not: {names}",
        *update_messages.update_lines(history),
    ]
    advice = update_messages.update_advice(history)
    summary = f"the update of step {history.by_update} wrote {first.counts} into {first.name}"
    return report(seen, Verdict.UPDATE_NONFINITE, first, evidence, (), advice, summary=summary)


def weight_in_backward(seen: Evidence, origin: Offender) -> OverflowReport:
    """A weight that the loss does not depend on made the gradients bad."""
    return report(
        seen,
        Verdict.WEIGHTS_NONFINITE,
        origin,
        [f"{the_loss(seen)} is finite, as it does not depend on what the bad weight makes; but 0 times NaN is NaN"],
        (),
        f"Repair {origin.name}: no loss scale can mend it.",
        summary=_holds(origin),
    )


def optimizer_state_nonfinite(seen: Evidence, first: Offender) -> OverflowReport:
    """The optimizer wrote its non-finite state into a weight."""
    step = 0 if seen.history is None else seen.history.by_update
    written = (
        [f"the update of step {step} wrote it into {seen.suspects[0].name}, which was finite before"] if step else []
    )
    return report(
        seen,
        Verdict.OPTIMIZER_STATE_NONFINITE,
        first,
        [
            f"{the_loss(seen)} is not finite ({loss_text(seen)}), nor is {seen.suspects[0]}",
            f"nor is the optimizer's state of {first.name} (a moment or the float32 master copy): {first.counts}",
            "steps with such gradients are skipped, so the state was bad before the weight",
            *written,
        ],
        (),
        f"Go back to a healthy checkpoint, or reset the optimizer's state of {first.name} and load its weights anew: "
        "the next step that is applied would write it into the weights again.",
        summary=f"the optimizer's state of {first.name} holds {first.counts}, which it wrote into the weight",
    )


def optimizer_state_in_update(seen: Evidence, first: Offender) -> OverflowReport:
    """The optimizer's state is bad, and neither a weight nor a gradient of the model's own call is."""
    loss = [f"{the_loss(seen)} is finite"] if seen.loss_known and seen.loss is None else []
    if seen.gradients:
        finite = "the model's own call gave every parameter a finite gradient when it was run again"
    else:
        finite = "the framework calls this step an overflow; the guard found no non-finite gradient to account for it"
    return report(
        seen,
        Verdict.OPTIMIZER_STATE_NONFINITE,
        first,
        [
            *loss,
            _finite_weights(seen),
            finite,
            f"the optimizer's state of {first.name} (a moment or the float32 master copy) is not: {first.counts}",
            "some optimizers, Muon for one, compute with their state before the framework checks for overflows",
        ],
        (),
        f"Go back to a healthy checkpoint, or reset the optimizer's state of {first.name}, before a step that is "
        "applied writes it into the weights.",
        summary=f"the optimizer's state of {first.name} holds {first.counts}; no weight is bad yet",
    )


def rank_fault(seen: Evidence) -> OverflowReport:
    """One rank was not finite, and its replay is."""
    first = seen.loss or seen.gradients[0]
    rank, what = first.rank, "was finite"
    if seen.replay is not None and seen.loss is not None:
        rank, what = seen.replay.differing_rank, "returned something else, all finite"
    before = None if rank is None else seen.rank_faults.get(rank)
    comes_back = before is not None and seen.step - before <= RANK_FAULT_MEMORY
    found = report(
        seen,
        Verdict.RANK_FAULT,
        replace(first, rank=rank),
        [
            f"only rank {rank} was not finite, and the same batch, run again on it, {what}",
            "run once more, it gave the same bits again, as every other rank did from the start",
            *([f"it was so before on rank {rank}, in step {before}"] if comes_back else []),
            _finite_weights(seen),
        ],
        ("code outside of the model that changed gradients on this rank alone",),
        f"Suspect the hardware of rank {rank}: look at its error counters and temperature, and run it without "
        "that device. If it comes back with another batch on the same rank, it is the hardware.",
        summary=f"rank {rank} alone was wrong, and the same batch, run again there, was not",
    )
    return replace(found, recoverable=False) if comes_back else found


def reduction_overflow(seen: Evidence) -> OverflowReport:
    """Gradients were finite on every rank, and their sum is not."""
    return report(
        seen,
        Verdict.REDUCTION_OVERFLOW,
        replace(seen.gradients[0], kind="reduction"),
        [
            "every rank's own gradients were finite"
            + ("" if seen.bad_ranks == 0 else ", when the batch was run again")
            + ", their sum is not"
        ],
        (),
        "The sum over the ranks is too large for the dtype that it is made in: divide before it (prescale_gradients, "
        "gradient_predivide_factor), or reduce in a wider dtype (communication_data_type: bf16 or fp32). A lower loss "
        "scale helps as well, and costs small gradients.",
        summary="gradients are finite on every rank, and their sum is not",
    )


def backward_nonfinite(seen: Evidence, first: Offender) -> OverflowReport:
    """The backward pass made the non-finite value, whatever the loss scale."""
    where = f"module {first.module}" if first.module else "the root module"
    return report(
        seen,
        Verdict.BACKWARD_NONFINITE,
        first,
        [f"{the_loss(seen)} is finite", _finite_weights(seen), *_scale_lines(seen)],
        (),
        f"The backward pass made it in {where}: look there for a division, a square root, a logarithm or a norm at 0, "
        "and for a sum that is too large for the dtype.",
        summary=f"the backward pass made it in {where}",
    )


def sum_nonfinite(seen: Evidence, first: Offender) -> OverflowReport:
    """The gradients of each micro-batch are finite when they are run again, and may well be infinite as a sum."""
    return report(
        seen,
        Verdict.BACKWARD_NONFINITE,
        first,
        [
            f"{the_loss(seen)} is finite",
            _finite_weights(seen),
            *_scale_lines(seen),
            f"added up, the largest gradients may exceed what {first.dtype} can hold",
        ],
        (),
        "Divide the loss by the number of micro-batches, or accumulate in float32 or bfloat16.",
        summary=f"the gradients of each micro-batch are finite, and their sum in {first.name} is not",
    )


def _scale_lines(seen: Evidence) -> list[str]:
    """Why the loss scale is not the cause."""
    if seen.scaling.scale <= 1.0:
        return [f"the loss scale is {seen.scaling.scale:g}: it cannot be too high"]
    if not seen.scaling.dynamic:
        return [f"the loss scale is {seen.scaling.scale:g} and does not change"]
    if not seen.scaling.can_fall:
        return [f"the loss scale is at its minimum, {seen.scaling.minimum:g}: it cannot be too high"]
    return []


def input_nonfinite(seen: Evidence, first: Offender) -> OverflowReport:
    """The model was called with a non-finite tensor."""
    sample = f", sample {first.index[0]}" if len(first.index) > 1 else ""
    found = report(
        seen,
        Verdict.INPUT_NONFINITE,
        first if seen.bad_feed is None else seen.bad_feed.origin,
        [
            f"{the_loss(seen)} is not finite ({loss_text(seen)})",
            _finite_weights(seen),
            (
                f"what the model was called with is not: {first.name}{sample}, micro-batch "
                f"{seen.micro_batch + seen.calls_before} of the step"
            ),
            *_how_many_samples(seen),
            *_feed_lines(seen),
        ],
        (),
        f"{_find_the_input(seen, first.rank)} The loss scale has no part in it: policy.keep_scale leaves it alone.",
        summary=f"{first.name}, which the model was called with, holds {first.counts}{sample}",
    )
    return replace(found, recoverable=None) if _is_of_the_pipeline(seen) else found


def _all_samples_are_bad(seen: Evidence) -> bool:
    return seen.bad_samples is not None and seen.bad_samples[0] == seen.bad_samples[1] > 1


def _is_of_the_pipeline(seen: Evidence) -> bool:
    """Whether it is not one sample that is bad, so that the next batch may well be bad too."""
    return seen.bad_feed is not None or seen.input_comes_back or _all_samples_are_bad(seen)


def _how_many_samples(seen: Evidence) -> list[str]:
    lines = []
    if seen.bad_samples is not None:
        bad, total = seen.bad_samples
        lines.append(f"{bad} of its {plural(total, 'sample')} {'is' if bad == 1 else 'are'} not finite")
    if seen.input_comes_back:
        lines.append("the step before was skipped because of an input as well")
    return lines


def _feed_lines(seen: Evidence) -> list[str]:
    feed = seen.bad_feed
    return [] if feed is None else [f"{feed.module}, outside of the model, returned what is not finite", *feed.details]


def _find_the_input(seen: Evidence, rank: int | None) -> str:
    """Advice on an input: one bad sample, or all of them, or the module that made it."""
    where, feed = on_rank(seen, rank), seen.bad_feed
    if feed is not None:
        return _mend_the_feed(feed)
    if not _is_of_the_pipeline(seen):
        return (
            f"This step is lost, the next batch is not. Find the sample in the data{where} and look at how it was read "
            "and normalised."
        )
    what = "All samples are bad" if _all_samples_are_bad(seen) else "Samples are bad"
    if seen.input_comes_back:
        what += ", in this step and in the one before"
    return (
        f"{what}: look at what made them{where}, and not for one sample: an encoder in half precision that overflows, "
        "a division in the preprocessing, a damaged cache. If a module outside of the model made them, "
        "attach(..., also=[module]) names it."
    )


def _mend_the_feed(feed: BadFeed) -> str:
    origin, module = feed.origin, feed.module.partition(".")[0]
    if origin.kind in ("parameter", "buffer"):
        return f"Repair {origin.name}: it is not finite, and {module} makes what the model is called with."
    if origin.kind == "input":
        return f"Look at what {feed.module} was called with: it was not finite before."
    return (
        f"{origin.name} made it, outside of the model. If the numbers there are near the largest that {origin.dtype} "
        f"can hold, run {module} in float32 or bfloat16; else look at what {module} is called with."
    )


def loss_nonfinite(seen: Evidence, loss: Offender) -> OverflowReport:
    """The loss is bad, and the model's inputs are not."""
    if seen.answer is not None and seen.answer.only_compiled:
        return only_compiled(seen, loss)
    if seen.answer is not None:
        origin = seen.answer.origin
        if origin is not None:
            return _forward_nonfinite(seen, origin)
    if seen.bad_feed is not None:
        return _fed_to_the_loss(seen, seen.bad_feed)
    if seen.answer is not None:
        return _loss_code(seen, loss)
    return report(
        seen,
        Verdict.UNDETERMINED,
        loss,
        _before_the_loss(seen),
        (*_unseen_batch(seen), "labels that the model was not called with", "the outputs of the modules"),
        ("A" if seen.batch_known else "A non-finite value came in with the batch, or a")
        + " non-finite value arose in the forward pass or in the loss; the loss scale acts later, so lowering it will "
        "hardly help. Check the labels of this batch, or run the forward pass in float32 or bfloat16.",
    )


def only_compiled(seen: Evidence, loss: Offender) -> OverflowReport:
    """The compiled model is not finite, and the same model run eagerly is."""
    found = report(
        seen,
        Verdict.FORWARD_NONFINITE,
        loss,
        [
            *_before_the_loss(seen),
            "the same batch, run again with the compiled model, gave the same; run again eagerly, it was finite",
        ],
        ("the operation in the compiled code",),
        'Compile with backend="aot_eager": if that is finite, the kernels of Inductor are the cause, which keep other '
        "digits between operations than eager ones (torch._inductor.config.emulate_precision_casts = True makes them "
        "alike). torch.compiler.disable leaves a function out, by which the place is found.",
    )
    summary = "the compiled model made it; run eagerly, the same batch is finite"
    return replace(found, summary=summary, known_from="both runs")


_FORWARD_KINDS = {
    "parameter": Verdict.WEIGHTS_NONFINITE,
    "buffer": Verdict.WEIGHTS_NONFINITE,
    "input": Verdict.INPUT_NONFINITE,
}


def _forward_nonfinite(seen: Evidence, origin: Offender) -> OverflowReport:
    verdict = _FORWARD_KINDS.get(origin.kind, Verdict.FORWARD_NONFINITE)
    where = f"module {origin.name}" if origin.name else "the root module's own code"
    rank = on_rank(seen, origin.rank)
    if verdict is Verdict.WEIGHTS_NONFINITE:
        advice = f"Repair {origin.name}, or find out why this batch reads what no batch before has."
    elif verdict is Verdict.INPUT_NONFINITE:
        advice = _find_the_input(seen, origin.rank)
    else:
        advice = (
            f"The forward pass made it in {where}{rank}. If the numbers there are near the largest that {origin.dtype} "
            "can hold, run it in bfloat16 or float32, or clamp them; else look for a division, a square root, a "
            "logarithm or a row that is masked throughout. The loss scale acts later: lowering it does not help."
        )
    summary = _holds(origin)
    if verdict is Verdict.FORWARD_NONFINITE:
        summary = f"the forward pass made it in {where}: {origin.counts}"
    return report(seen, verdict, origin, _before_the_loss(seen), (), advice, summary=summary)


def _loss_code(seen: Evidence, loss: Offender) -> OverflowReport:
    found = report(
        seen,
        Verdict.UNDETERMINED,
        loss,
        [*_before_the_loss(seen), *_after_the_model(seen)],
        ("labels that the model was not called with", "the operations after the model"),
        f"It was made after the model, or came in there: look at the code that computes the loss{_names(seen)}, at the "
        f"labels{on_rank(seen, loss.rank)}, and at the dtype. Lowering the loss scale does not help. {_WRAP_STEP}",
    )
    return replace(found, summary="the loss is not finite and what the model returned is: it came in after the model")


def loss_backward(seen: Evidence, first: Offender) -> OverflowReport:
    """The gradient that arrived at the model's output was not finite, though the loss is."""
    found = report(
        seen,
        Verdict.BACKWARD_NONFINITE,
        first,
        [f"{the_loss(seen)} is finite", _finite_weights(seen), *_after_the_model(seen)],
        ("the operation behind it",),
        f"Look at the code that computes the loss from what the model returned{_names(seen)}: its backward pass made "
        f"it, as that of a square root, a norm or a division at 0. {_WRAP_STEP}",
    )
    return replace(found, summary="the backward pass of the code after the model made it")


_WRAP_STEP = "guard.wrap_step(fn) around forward pass and loss names the operation at the first occurrence."


def _after_the_model(seen: Evidence) -> list[str]:
    names = ", ".join(seen.after_the_model)
    return [f"between the model's output and the loss autograd has recorded: {names}"] if names else []


def _names(seen: Evidence) -> str:
    return f" (first at {' and '.join(seen.after_the_model[:2])})" if seen.after_the_model else ""


def _fed_to_the_loss(seen: Evidence, feed: BadFeed) -> OverflowReport:
    """A module outside of the model made a non-finite value, and not by way of the model's inputs."""
    is_weight = feed.origin.kind in ("parameter", "buffer")
    return report(
        seen,
        Verdict.WEIGHTS_NONFINITE if is_weight else Verdict.FORWARD_NONFINITE,
        feed.origin,
        [*_before_the_loss(seen), *_feed_lines(seen)],
        ("how what it returned reaches the loss",),
        _mend_the_feed(feed),
    )


def _before_the_loss(seen: Evidence) -> list[str]:
    finite_inputs = ["what the model was called with is finite"] if seen.batch_known else []
    return [f"{the_loss(seen)} is not finite ({loss_text(seen)})", _finite_weights(seen), *finite_inputs]


def _unseen_batch(seen: Evidence) -> tuple[str, ...]:
    return () if seen.batch_known else ("the batch: what the model was called with was not seen, or changed since",)


def _unseen_loss(seen: Evidence) -> tuple[str, ...]:
    return () if seen.loss_shown else ("the loss: show it with watch_loss(loss), or engine.backward(loss)",)


def on_rank(seen: Evidence, rank: int | None) -> str:
    """Returns " of rank 3", where there are several."""
    return "" if rank is None or seen.world_size == 1 else f" of rank {rank}"


def scale_too_high(seen: Evidence) -> OverflowReport:
    """At a lower loss scale the gradients would be finite."""
    left = plural(seen.scaling.halvings_left, "halving")
    evidence = [f"{the_loss(seen)} is finite", _finite_weights(seen), f"the loss scale is {seen.scaling}"]
    replayed = seen.replay.settles_at if seen.replay is not None else None
    proved_before = seen.proved_before if (seen.proved_before or math.inf) < seen.scaling.scale else None
    settles_at = replayed or proved_before or seen.settles_at
    if replayed is None and seen.answer is not None and seen.answer.gradient_sum > 0:
        evidence.append(
            f"summed over micro-batches and ranks, gradients come to up to {seen.answer.gradient_sum:.4g}: what is too "
            "large may be their sum"
        )
    if settles_at is None:
        outlook = f"it will be lowered until a step is finite, {left} left"
    else:
        power = f"2^{math.log2(settles_at):g}"
        outlook = f"it is expected to settle at {power}, {left} left"
        if replayed:
            evidence.append(f"run again, this batch was finite at {power}, and at no more than that")
        elif proved_before:
            evidence.append(f"a batch that was skipped before was finite at {power}, when it was run again")
        else:
            evidence.append(f"the gradients of the last finite steps fit at {power}, and at no more than that")
    advice = f"Let the loss scale go on: {outlook}."
    if not seen.scaling.can_fall:
        remedy = "lower it" if settles_at is None else f"set it to {settles_at:g}"
        advice = f"The loss scale is fixed at {seen.scaling}: {remedy}."
    found = report(
        seen,
        Verdict.SCALE_TOO_HIGH,
        seen.gradients[0] if seen.replay is None or seen.replay.origin is None else seen.replay.origin,
        evidence,
        () if replayed else (*_unseen_loss(seen), "whether this batch is finite at a lower scale"),
        advice if replayed else f"{advice} The verdict is provisional until a step is finite.",
        settles_at=settles_at,
        summary=f"the loss scale was too high{'' if replayed else ', as far as is known'}",
    )
    return found if seen.scaling.can_fall else replace(found, recoverable=None)


def lost_between_stages(seen: Evidence, lost: LostBetween) -> OverflowReport:
    """What a stage of a pipeline was given is not what the stage before has returned."""
    sender, receiver = f"stage {lost.stage - 1}", f"stage {lost.stage}"
    returned, given = map(_figures, (lost.returned, lost.given))
    return report(
        seen,
        Verdict.UNDETERMINED,
        seen.loss or seen.gradients[0],
        [
            *([] if seen.suspects else [_finite_weights(seen)]),
            (
                f"micro-batch {lost.micro_batch + seen.calls_before}: {sender} has returned {returned}, and {receiver} "
                f"was given {given}"
            ),
        ],
        ("the transfer itself", "what follows from it"),
        f"Look at what lies between {sender} and {receiver}: a buffer that is written to before it was sent, an output "
        "that is changed in place after the stage has returned it, the network and its driver.",
        summary=f"{receiver} of the pipeline was given something else than {sender} has returned",
    )


def _figures(figures: Figures) -> str:
    return (
        f"{figures.numel:.0f} values ({figures.nonfinite:.0f} of them NaN or +Inf, the largest finite one "
        f"{figures.absmax:.6g}, the sum of squares {figures.sumsq:.6g})"
    )


def not_reproduced(seen: Evidence) -> OverflowReport:
    """Gradients were bad, and are not when the batch is run again."""
    first = seen.gradients[0]
    sources = "a penalty on weights, a second loss, or a hook or clipping that changed gradients afterwards"
    if seen.world_size > 1:
        sources += "; else the reduction, or one rank that was wrong once"
    hint = ""
    if seen.world_size > 1 and seen.bad_ranks is None:  # else it has been told
        hint = ' If it comes back, GuardConfig(local_gradients="always") tells which rank it is.'
    return report(
        seen,
        Verdict.UNDETERMINED,
        first,
        [
            f"{the_loss(seen)} is finite",
            _finite_weights(seen),
            (
                "the model's own call gave every parameter a finite gradient when it was run again: what is not finite "
                "came from elsewhere"
            ),
        ],
        ("what is computed outside of the model's call",),
        f"Look at what else {first.name} gets a gradient from: {sources}.{hint}",
        summary=f"{first.name} got a gradient that is not finite from elsewhere than the model's own call",
    )


def gradients_nonfinite(seen: Evidence) -> OverflowReport:
    """Gradients are bad, for a reason that the evidence does not show."""
    evidence = [f"{the_loss(seen)} is finite" if seen.loss_known else "the loss was not seen"]
    advice, first, summary = "", seen.gradients[0], ""
    if seen.suspects:
        evidence.append(f"not finite: {', '.join(item.name for item in seen.suspects[:3])}")
        evidence += update_messages.history_lines(seen.history)
        advice = f"{update_messages.mend(seen.history, seen.suspects[0])} Else: "
    else:
        evidence.append(_finite_weights(seen))
        if seen.loss_known and seen.loss_shown and not seen.scaling.can_fall:
            summary = (
                f"the loss is finite and the gradient of {first.name} is not: the operation behind it is not known"
            )
    return report(
        seen,
        Verdict.UNDETERMINED,
        first,
        [*evidence, *_scale_lines(seen)],
        (*_unseen_loss(seen), "the backward pass, module by module", "the gradients before the reduction"),
        f"{advice}The gradient of {first.name} is the first that is not finite: look at the operations behind it (a "
        "division, a square root, a logarithm or a norm at 0, and what was masked only after it was not finite), and "
        "at the batch.",
        summary=summary,
    )


def false_alarm(seen: Evidence) -> OverflowReport:
    """The framework reports an overflow that the guard cannot find."""
    return report(
        seen,
        Verdict.UNDETERMINED,
        seen.suspects[0] if seen.suspects else seen.loss,
        ["the framework calls this step an overflow; the guard found no non-finite gradient to account for it"],
        ("the framework's own check, which may have overflowed itself on large finite values",),
        "Look at the largest gradients (guard.history), and upgrade DeepSpeed if it is older than 0.19.8.",
        summary="the framework reports an overflow, and every gradient is finite",
    )


def with_armed_steps(report: OverflowReport, steps: int) -> OverflowReport:
    """Returns a report that says what the next steps will show."""
    next_steps = f"The next {steps} steps are watched operation by operation: if it comes back, its line is named."
    return replace(report, advice=f"{report.advice} {next_steps}")


def unexplained(step: int, scaling: LossScaling, world_size: int, skipped: int) -> OverflowReport:
    """The guard itself has failed, so that nothing else is known."""
    return OverflowReport(
        step=step,
        loss_scale=scaling.scale,
        verdict=Verdict.UNDETERMINED,
        provisional=False,
        recoverable=None,
        first=None,
        offenders=(),
        evidence=("the gradients are not finite",),
        not_checked=("everything else: the guard has failed on this rank or another, its error is in the log",),
        advice="Report the guard's error. The step was skipped as any other with such gradients; the next bad one is "
        "examined again.",
        world_size=world_size,
        consecutive_skips=skipped,
    )


def the_loss(seen: Evidence) -> str:
    """Returns what was looked at in place of the loss, or the loss."""
    return "the loss" if seen.loss_shown else "the model's output"


def loss_text(seen: Evidence) -> str:
    """Returns what the loss holds, and on which rank."""
    if seen.loss is None:
        return "finite"
    rank = seen.loss.rank
    where = "" if rank is None or seen.world_size == 1 else f" on rank {rank}"
    return seen.loss.counts.partition(" ")[2] + where


def _scaled_together(seen: Evidence) -> list[str]:
    """A sentence where nothing but NaN is left in several gradients, though the loss is finite."""
    names = [item.name for item in seen.gradients]
    is_total = len(names) > 1 and all(item.nan == item.numel for item in seen.gradients)
    if not is_total or seen.loss is not None or not seen.loss_known:
        return []
    line = (
        f"every element of these {len(names)} gradients is NaN, as after a multiplication by a norm that is NaN "
        "(clipping before the guard has read them): then none of them shows where it began"
    )
    return [line]


def _holds(offender: Offender) -> str:
    return f"{offender.kind} {offender.name} holds {offender.counts}"


def plural(count: int, noun: str) -> str:
    """Returns a count and its noun, in the plural where needed."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
