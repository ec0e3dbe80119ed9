"""What an overflow means: a pure function from evidence to a report that also lists what was not checked."""

from __future__ import annotations

import math
from dataclasses import replace

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.diagnosis import messages
from hallo_numguard.guard.diagnosis.evidence import Evidence, Replayed
from hallo_numguard.guard.diagnosis.source_messages import by_source
from hallo_numguard.tracing.watch import PART

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}
"""Largest numbers of the dtypes that gradients are reduced in."""

_OF_OPERATIONS = (
    Verdict.FORWARD_NONFINITE,
    Verdict.LOSS_NONFINITE,
    Verdict.BACKWARD_NONFINITE,
    Verdict.UNDETERMINED,
)


def needs_replay(seen: Evidence) -> bool:
    """Returns whether a replay would add evidence."""
    if seen.watched is not None and _explains(seen, seen.watched):
        return False
    if seen.loss is not None:
        return not seen.suspects and seen.input is None and seen.lost_between is None
    if not seen.gradients or seen.lost_between is not None or _overflowed_in_the_reduction(seen):
        return False
    return seen.proved_before is None or seen.scaling.scale <= seen.proved_before


def needs_replay_of_step(found: Replayed) -> bool:
    """Returns whether the model alone, run again, explains nothing, so that the rest of the step is left."""
    return found.source is None and found.origin is None and not found.is_one_ranks_fault


def judge(seen: Evidence) -> OverflowReport:
    """Returns the report on an overflow. Causes are tried in dataflow order: the earliest wins."""
    if seen.loss is not None and seen.suspects:
        if seen.history is not None and seen.history.is_by_update and not _has_bad_moment(seen):
            return messages.update_nonfinite(seen, seen.suspects[0], seen.history)
        written = _written_by_the_optimizer(seen)
        return (
            messages.weights_nonfinite(seen) if written is None else messages.optimizer_state_nonfinite(seen, written)
        )
    if not seen.gradients:
        state = None if seen.suspects or seen.loss is not None else next(iter(seen.state), None)
        return messages.false_alarm(seen) if state is None else messages.optimizer_state_in_update(seen, state)
    if seen.loss is not None and seen.input is not None:
        return messages.input_nonfinite(seen, seen.input)
    if seen.lost_between is not None:
        return messages.lost_between_stages(seen, seen.lost_between)
    if _is_one_ranks_fault(seen):
        return messages.rank_fault(seen)
    if seen.source is not None and _explains(seen, seen.source):
        return _by_source(seen, seen.source)
    if seen.loss is not None:
        return messages.loss_nonfinite(seen, seen.loss)
    if _overflowed_in_the_reduction(seen):
        return messages.reduction_overflow(seen)
    if seen.answer is not None and seen.answer.origin is not None:
        return _judge_by_replay(seen, seen.answer, seen.answer.origin)
    if seen.answer is not None and not _may_have_added_up(seen, seen.answer):
        state = _state_behind_gradients(seen)
        return messages.not_reproduced(seen) if state is None else messages.optimizer_state_in_update(seen, state)
    if _is_of_loss_code(seen):
        return messages.loss_backward(seen, seen.gradients[0])
    if seen.loss_known and seen.scaling.can_fall:
        return messages.scale_too_high(seen)
    if seen.answer is not None:
        return messages.sum_nonfinite(seen, seen.gradients[0])
    return messages.gradients_nonfinite(seen)


def _by_source(seen: Evidence, source: Source) -> OverflowReport:
    """The report on a source; a weight that is read only while it is used may have state that was bad before it."""
    found = by_source(seen, source, seen.known_from)
    name = "" if found.first is None else found.first.name.removesuffix(PART)
    state = next((item for item in seen.state if item.name == name), None)
    if source.kind != "parameter" or found.first is None or state is None:
        return found
    return messages.optimizer_state_nonfinite(replace(seen, suspects=[found.first]), state)


def _explains(seen: Evidence, source: Source) -> bool:
    """Whether a source is the cause, and not the loss scale, by which gradients become too large for the dtype."""
    if seen.loss is not None or source.phase == "forward" or not seen.scaling.can_fall or seen.scaling.scale <= 1.0:
        return True
    if seen.answer is not None and seen.answer.finite_unscaled is not None:
        return not seen.answer.finite_unscaled
    return source.is_singular


def _judge_by_replay(seen: Evidence, replay: Replayed, origin: Offender) -> OverflowReport:
    if seen.history is not None and seen.history.is_by_update and origin.name == seen.history.name:
        return messages.update_nonfinite(seen, seen.suspects[0], seen.history)
    if origin.kind in ("parameter", "buffer"):
        return messages.weight_in_backward(seen, origin)
    if replay.finite_unscaled:
        return messages.scale_too_high(seen)
    if replay.finite_unscaled is False or seen.scaling.scale <= 1.0:
        return messages.backward_nonfinite(seen, origin)
    return messages.gradients_nonfinite(seen)


def is_unexplained(report: OverflowReport) -> bool:
    """Returns whether the operation that the cause lies in is still to be found."""
    if report.verdict is Verdict.SCALE_TOO_HIGH:
        return report.provisional
    return report.verdict in _OF_OPERATIONS and not report.known_from


def confirm(report: OverflowReport, scale: float, skipped: int) -> OverflowReport:
    """Returns a provisional report as a final one, after a later step was finite."""
    if report.verdict is not Verdict.SCALE_TOO_HIGH:
        return replace(report, provisional=False)
    power = math.log2(scale)
    note = ", as was expected" if scale == report.settles_at else ""
    return replace(
        report,
        provisional=False,
        evidence=(*report.evidence, f"a step at loss scale 2^{power:g} ({scale:g}) was finite{note}"),
        not_checked=(),
        advice=(
            f"Nothing to mend: the loss scale settled at 2^{power:g} after {messages.plural(skipped, 'skipped step')}. "
            f"If that happens at every start, begin there: initial_scale_power {power:g}, a GradScaler's init_scale "
            f"{scale:g}."
        ),
    )


def _written_by_the_optimizer(seen: Evidence) -> Offender | None:
    """The non-finite optimizer state behind the first bad weight that has such state.

    Steps with bad gradients are skipped, so a bad weight cannot make the state bad: the state came first.
    """
    by_name = {item.name: item for item in seen.state}
    return next((by_name[item.name] for item in seen.suspects if item.name in by_name), None)


def _state_behind_gradients(seen: Evidence) -> Offender | None:
    """The non-finite optimizer state of the first bad gradient, if each of the bad ones has such state.

    Muon makes its update of gradient and momentum while gradients are reduced, or before their norm is taken.
    """
    by_name = {item.name: item for item in seen.state}
    found = [by_name.get(gradient.name) for gradient in seen.gradients]
    return found[0] if None not in found and not seen.suspects else None


def _has_bad_moment(seen: Evidence) -> bool:
    """Whether a moment of the first bad weight was bad, and no setting of the update has made it so."""
    update = None if seen.history is None else seen.history.update
    if update is None:
        return False
    is_bad_elsewhere = bool(seen.suspects) and seen.suspects[0].name in {item.name for item in seen.state}
    return update.has_bad_moment or (
        is_bad_elsewhere and not update.has_bad_settings
    )  # another rank may hold the moment


def _overflowed_in_the_reduction(seen: Evidence) -> bool:
    """Whether a sum of finite numbers is infinite; NaN alone came from elsewhere (a hook that ran after ours).

    Not if a rank's own micro-batches may have been too large as a sum already.
    """
    if seen.loss is not None or not seen.gradients or 1 in (seen.world_size, seen.copies):
        return False
    first, answer = seen.gradients[0], seen.answer
    largest = LARGEST.get(first.dtype, math.inf)
    was_finite = seen.bad_ranks == 0 and seen.rank_sum <= largest
    is_possible = answer is not None and answer.rank_sum <= largest < answer.gradient_sum
    finite_again = seen.bad_ranks is None and is_possible and answer is not None and answer.origin is None
    return (was_finite or finite_again) and first.pos_inf + first.neg_inf > 0 and first.nan == 0


def _may_have_added_up(seen: Evidence, replay: Replayed) -> bool:
    """Whether finite gradients of several micro-batches may be infinite as a sum; it is never NaN."""
    first = seen.gradients[0]
    largest = max(replay.gradient_sum, seen.rank_sum if seen.bad_ranks == 0 else 0.0)
    return replay.micro_batch > 0 and first.nan == 0 and largest > LARGEST.get(first.dtype, math.inf)


def _is_one_ranks_fault(seen: Evidence) -> bool:
    """Whether one rank of several was bad, and its hardware is all that is left to suspect.

    It is compared with ranks that compute the same, which a stage of a pipeline without copies has not.
    """
    if seen.replay is None or not seen.replay.is_one_ranks_fault or 1 in (seen.world_size, seen.copies):
        return False
    return seen.loss is not None or seen.bad_ranks == 1


def _is_of_loss_code(seen: Evidence) -> bool:
    """Whether the gradient was bad where it arrived at the model's output, and the loss scale cannot be the reason."""
    came_from_there = seen.replay is not None and seen.replay.came_from_the_loss
    return came_from_there and seen.loss_shown and not seen.scaling.can_fall
