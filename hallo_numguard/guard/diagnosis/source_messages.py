"""Reports on causes that were followed from operation to operation."""

from __future__ import annotations

from dataclasses import replace

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict, shape_in_words
from hallo_numguard.core.sources import WRITTEN_DOWN, Source
from hallo_numguard.guard.diagnosis import messages
from hallo_numguard.guard.diagnosis.evidence import Evidence
from hallo_numguard.guard.diagnosis.remedies import remedy, spoken_name

_BEFORE = {
    "parameter": Verdict.WEIGHTS_NONFINITE,
    "buffer": Verdict.WEIGHTS_NONFINITE,
    "input": Verdict.INPUT_NONFINITE,
    "outside": Verdict.INPUT_NONFINITE,
}


def verdict_of(source: Source) -> Verdict:
    """Returns the verdict on a source."""
    if source.kind in _BEFORE:
        return _BEFORE[source.kind]
    if source.phase == "backward":
        return Verdict.BACKWARD_NONFINITE
    return Verdict.LOSS_NONFINITE if source.module is None else Verdict.FORWARD_NONFINITE


def by_source(seen: Evidence, source: Source, known_from: str) -> OverflowReport:
    """Returns the report on a cause.

    Args:
        seen: The evidence.
        source: Where what is not finite came from.
        known_from: What has shown it.
    """
    verdict = verdict_of(source)
    report = messages.report(
        seen, verdict, _first(seen, source), _evidence(seen, source), (), _advice(seen, source, verdict)
    )
    # What is no part of the batch may be there in every step.
    recoverable = None if source.kind == "outside" else report.recoverable
    return replace(report, recoverable=recoverable, summary=_summary(seen, source), known_from=known_from)


def what(source: Source) -> str:
    """Returns "NaN", "Inf" or both, as the source holds."""
    record = source.tensor.record
    kinds = ("NaN" if record.nan else "", "Inf" if record.pos_inf + record.neg_inf else "")
    return " and ".join(kind for kind in kinds if kind)


def summary_of(source: Source, is_whole_step: bool = False) -> str:
    """Returns the answer in one sentence, without a full stop.

    Args:
        source: Where what is not finite came from.
        is_whole_step: Whether inputs are those of the function that makes the loss, and not of the model.
    """
    sample = "" if source.sample is None else f", sample {source.sample}"
    if source.kind in ("parameter", "buffer"):
        return f"{source.kind} {source.name} holds {source.tensor.counts}"
    if source.kind == "input":
        called = "the step" if is_whole_step else "the model"
        return f"{source.name}, which {called} was called with, holds {source.tensor.counts}{sample}"
    if source.kind == "outside":
        before = "the step began" if is_whole_step else "the model was called"
        return f"a tensor made before {before} holds {source.tensor.counts}{sample}, used in {_place(source)}"
    because = f": {source.explanation}" if source.explanation else (f": {source.large}" if source.large else "")
    return f"{_place(source)} made {what(source)} in {spoken_name(source)}{sample}{because}"


def _place(source: Source) -> str:
    if source.module:
        return source.module
    if source.module == "":
        return "the model's own code" + (f" ({source.line})" if source.line else "")
    if source.line is None and source.phase == "backward":
        return "code that was called before the model in this step"  # lines are kept from the model's first call on
    return f"code outside of the model ({source.line})" if source.line else "code outside of the model"


def _summary(seen: Evidence, source: Source) -> str:
    return summary_of(source, seen.answer is not None and seen.answer.is_whole_step)


def _evidence(seen: Evidence, source: Source) -> list[str]:
    is_loss_bad = seen.loss is not None
    state = f"not finite ({messages.loss_text(seen)})" if is_loss_bad else "finite"
    lines = [f"{messages.the_loss(seen)} is {state}"]
    if source.kind == "operation":
        lines.append(what_it_made(source))
    if source.large and source.large not in _summary(seen, source):
        lines.append(source.large)
    if source.hidden_by:
        unseen = "" if is_loss_bad or not seen.loss_shown else ", so that the loss did not see it"
        lines.append(f"made finite afterwards by {'; '.join(source.hidden_by)}{unseen}")
    elif not is_loss_bad and seen.loss_shown and source.phase == "forward":
        lines.append("the loss did not see it, as it does not depend on it; but 0 times NaN or Inf is NaN")
    if source.module is None and source.kind == "operation":
        lines.append("that is outside of the model's call")
    return lines


def what_it_made(source: Source) -> str:
    """Returns what the operation was given and what it returned, in a sentence."""
    tensor = source.tensor
    index = f" from element [{', '.join(map(str, tensor.index))}] on" if tensor.index else ""
    returned = f"{tensor.counts}{index} ({shape_in_words(tensor.shape)} {tensor.dtype})"
    node = f" in {source.node}" if source.node else ""
    if source.is_fill or source.explanation == WRITTEN_DOWN:
        return f"{source.operation}{node} wrote {returned}"
    given = f"finite but for Inf that was written on purpose, by {source.fill}" if source.fill else "finite"
    return f"what {source.operation}{node} was given is {given}; it returned {returned}"


def _advice(seen: Evidence, source: Source, verdict: Verdict) -> str:
    if source.kind in ("parameter", "buffer"):
        repair = f"Repair {source.name}, or find out why this batch reads what no batch before has."
        if source.kind == "buffer":
            return f"{repair} A buffer that the model computes when it is made is in no file: make it anew."
        return f"{repair} If it was loaded, check the file; else initialise it."
    if source.kind == "outside":
        return (
            "Look at how it was made. If it is of this batch, as a target or a mask, find the sample in the data; if "
            "the script keeps it, as weights of classes or statistics of the data, every step has it. In computing "
            "it, look for the logarithm of 0, a division by a count or a deviation of 0, and what was left empty."
        )
    if verdict is Verdict.INPUT_NONFINITE:
        rank = messages.on_rank(seen, source.rank)
        return (
            f"This step is lost, the next batch is not. Find the sample in the data{rank}, and look at how it was made."
        )
    scale = " The loss scale has no part in it." if seen.scaling.dynamic else ""
    return f"{remedy(source)}{scale}"


def _first(seen: Evidence, source: Source) -> Offender:
    return with_operation(_known_offender(seen, source) or _offender(source), source)


def with_operation(offender: Offender, source: Source) -> Offender:
    """Returns an offender that says which operation it comes from."""
    return replace(offender, operation=source.operation or None, line=source.line, sample=source.sample)


def _known_offender(seen: Evidence, source: Source) -> Offender | None:
    """The offender of the same place that was found otherwise, with what followed from it there."""
    origin = None if seen.replay is None else seen.replay.origin
    is_forward = source.phase == "forward"
    if source.kind != "operation":
        return origin if origin is not None and (origin.kind, origin.name) == (source.kind, source.name) else None
    if origin is not None and origin.module == (source.module or "") and (origin.kind == "gradient") != is_forward:
        return origin
    if source.module is not None:
        return None
    return seen.loss if is_forward else next(iter(seen.gradients), None)


def _offender(source: Source) -> Offender:
    kind, name = source.kind, source.name
    if kind == "operation":
        kind = "gradient" if source.phase == "backward" else ("loss" if source.module is None else "activation")
        name = "loss" if source.module is None else (source.module or "output")
    elif kind in ("outside", "gradient"):
        kind, name = "input", source.name or "a tensor from outside of the model"
    return source.tensor.offender(kind, name, source.module or "", source.rank)
