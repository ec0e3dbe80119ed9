"""Reports and sentences on who wrote a weight that is not finite: an update, other code, or neither was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.core.safe_text import listed
from hallo_numguard.guard.diagnosis.catalog import CATALOG
from hallo_numguard.guard.diagnosis.weight_history import Update, WeightHistory
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.optimizer_view import OptimizerView
from hallo_numguard.guard.step.updates import Growth

MORE_LOOKS = "GuardConfig(check_updates='all') looks at every weight around every update"


def report_on_update(
    history: WeightHistory,
    first: Offender,
    state: Offender | None,
    names: Sequence[str],
    total: int,
    loss_scale: float,
    world_size: int,
) -> OverflowReport:
    """Returns the report on an update that was just made, and wrote what is not finite.

    Args:
        history: History of the first weight.
        first: That weight.
        state: The optimizer's state of that weight, if it is not finite.
        names: Names of all weights that it made so.
        total: Number of weights that were looked at.
        loss_scale: Loss scale of the step.
        world_size: Number of ranks.
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    lines = [
        f"{len(names)} of {total} weights turned non-finite in that update: {listed(list(names))}",
        *update_lines(history),
    ]
    if state is not None:
        lines.append(f"the optimizer's state of {first.name} is not finite either: {state.counts}")
    return OverflowReport(
        step=history.by_update,
        loss_scale=loss_scale,
        verdict=Verdict.UPDATE_NONFINITE,
        provisional=False,
        recoverable=CATALOG[Verdict.UPDATE_NONFINITE].recoverable,
        first=first,
        offenders=(),
        evidence=tuple(lines),
        not_checked=(),
        advice=update_advice(history),
        world_size=world_size,
        consecutive_skips=0,
        happened=f"The update of step {history.by_update} made {first.name}{more} non-finite: {_why(history)}.",
    )


def growth_text(growth: Growth, item: NamedTensor, view: OptimizerView) -> str:
    """Returns the sentence on an update that made a weight absurdly large."""
    number = view.group_of(item.tensor)
    rate = None if number is None or number >= len(growth.groups) else growth.groups[number].get("lr")
    at_rate = "" if rate is None else f" at a learning rate of {float(rate):g} (parameter group {number})"
    return (
        f"step {growth.step}: one update{at_rate} made {item.name} reach {growth.after:.4g}, "
        f"before it {growth.before:.4g}: what is computed with it will likely overflow"
    )


def blamed_on_update(report: OverflowReport, history: WeightHistory) -> OverflowReport:
    """Returns a report on weights that are about to be saved, once it is known that an update wrote them."""
    has_bad_moment = history.update is not None and history.update.has_bad_moment
    verdict = Verdict.OPTIMIZER_STATE_NONFINITE if has_bad_moment else Verdict.UPDATE_NONFINITE
    return replace(
        report,
        verdict=verdict,
        recoverable=CATALOG[verdict].recoverable,
        evidence=(*report.evidence, *update_lines(history)),
        advice=update_advice(history),
    )


def update_lines(history: WeightHistory) -> list[str]:
    """Returns the evidence against an update: when, by which settings, and what is odd in them."""
    update = history.update
    if update is None:
        return []
    lines = [_seen(history)]
    group = "a parameter group that is unknown" if update.group is None else f"parameter group {update.group}"
    name = f" ({update.group_name})" if update.group_name else ""
    lines.append(f"{update.optimizer}, {group}{name}, as read at that update: {update.settings or 'no settings'}")
    lines += [f"odd: {sentence}" for sentence in update.odd]
    if not update.odd:
        lines.append("nothing is odd in these settings")
    if update.at_element:
        lines.append(f"at the first bad element, after the update: {update.at_element}")
    if update.master:
        lines.append(update.master)
    return lines


def _seen(history: WeightHistory) -> str:
    return (
        f"{history.name} was finite right before the update of step {history.by_update}, whose gradients were finite "
        "when they were checked, and is not right after it"
    )


def _why(history: WeightHistory) -> str:
    odd = () if history.update is None else history.update.odd
    return odd[0] if odd else "its gradients and settings were finite"


def update_advice(history: WeightHistory) -> str:
    """Returns what to do about a weight that an update wrote."""
    update = history.update
    step = history.by_update
    where = "start again" if step <= 1 else f"go back to a checkpoint from before step {step}"
    back = f"Then {where}: the weights that it wrote are lost."
    if update is None:
        return back
    if update.has_bad_moment and not update.odd:
        return (
            f"Reset the optimizer's state of {history.name}, or load an intact one: NaN in it does not come from "
            f"finite gradients. {back}"
        )
    return f"{update.advice or _look_at(update, history.name)} {back}"


def _look_at(update: Update, name: str) -> str:
    if "more than" in update.master:
        return (
            f"{name} has grown beyond its dtype: train it in bfloat16, which has the range of float32, or find out why "
            "it grows (learning rate, weight decay, a missing norm)."
        )
    return (
        f"Look at how {update.optimizer} computes its update from the values at that element: a division by a root "
        "that is 0 (a larger eps), a norm of a weight or gradient that is 0, a number too large for the weight's dtype."
    )


def history_lines(history: WeightHistory | None) -> list[str]:
    """Returns the evidence on who wrote a weight."""
    return update_lines(history) if history is not None and history.is_by_update else other_lines(history)


def mend(history: WeightHistory | None, first: Offender) -> str:
    """Returns what to do about a weight, whoever wrote it."""
    is_by_update = history is not None and history.is_by_update
    return update_advice(history) if history is not None and is_by_update else repair(history, first)


# -- weights that no update was seen to write --------------------------------------------------------------------------


def other_lines(history: WeightHistory | None) -> list[str]:
    """Returns the evidence on a weight that was not seen to be written by an update."""
    if history is None:
        return []
    name = history.name
    when = history.when
    if history.was_so:
        return [f"{name} was so already when {_seen_when(when)}: no step of this run has made it so"]
    if history.update is not None and history.update.has_bad_gradients:
        return [f"the update of step {history.by_update or history.last_update} applied gradients that were not finite"]
    if not history.is_trained:
        return [f"{name} was finite when {_seen_when(when)}, and the optimizer does not train it"]
    if history.is_by_other_code:
        master = history.update.master if history.update is not None else ""
        return [_between(history, when), *([master] if master else [])]
    if history.finite_at < 0:
        return []
    since = f"after the update of step {history.finite_at}" if history.finite_at else f"when {_seen_when(when)}"
    unseen = "whether an update since then or other code wrote it was not seen"
    return [f"{name} was last seen finite {since}; {unseen}: {MORE_LOOKS}"]


def _between(history: WeightHistory, when: str) -> str:
    name, last = history.name, history.last_update
    after = (
        f"right after the update of step {last}" if last else f"when {_seen_when(when)}, and no update was made since"
    )
    return f"{name} was finite {after}: code outside of the optimizer's updates has written it"


def _seen_when(when: str) -> str:
    return when if " " in when else f"the guard was {when or 'attached'}"


def repair(history: WeightHistory | None, first: Offender) -> str:
    """Returns what to do about a weight that no update was seen to write. Names files only where there may be one.

    Args:
        history: What is known of it; None if nothing is.
        first: The weight.
    """
    name = first.name
    if history is not None and history.in_no_file:
        return (
            f"Repair {name}: it is a non-persistent buffer, in no checkpoint or model file; the code that computes it "
            "(the module's constructor, or a move from the meta device) has left it unfilled or made it so."
        )
    if history is None or history.was_so:
        return (
            f"Repair {name}: if it was loaded, check the file it was loaded from (checksum, values, dtype), load an "
            "intact copy or go back to a healthy checkpoint; if it was not (a new head or layer, a key that was "
            "missing when weights were loaded), it is in no file: initialise it (torch.empty leaves what was in "
            "memory)."
        )
    if history.update is not None and history.update.has_bad_gradients:
        return (
            f"Go back to a checkpoint from before step {history.by_update or history.last_update}, and do not apply "
            "steps with such gradients (policy.enforce)."
        )
    return (
        f"Find the code that writes {name} beside the optimizer: averages that are swapped in (EMA), clipping or "
        "normalising of weights, initialisation, pruning, a load in the middle of the run; then go back to a healthy "
        "checkpoint."
    )
