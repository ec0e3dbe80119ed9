"""The check before weights are saved: what went bad in the run is not written, and replaces no healthy copy.

Legal are masks of -Inf, and values that were not finite already when the run was attached or loaded (an embedding row
that is never read may be NaN for ever), unless a report blames their tensor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from hallo_numguard.core.documents import decode, encode
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender, Verdict
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.containment import Probes
from hallo_numguard.guard.diagnosis.catalog import CATALOG
from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.named_tensors import (
    NamedTensor,
    named_buffers,
    named_parameters,
    scan_tensors,
    stats_of,
)

MAX_NAMES = 3  # of tensors in a sentence
_LEFT, _FINITE, _BAD = range(3)  # what a rank answers; the highest counts

_ADVICE = (
    "Do not go on with these values: resume from the last checkpoint, and look at what wrote them: the learning rate, "
    "eps and betas of that parameter's group, and code that changes weights between steps. "
    "Policy(on_bad_save='warn') saves all the same."
)


@dataclass(frozen=True)
class Save:
    """A save that is about to begin.

    Attributes:
        name: Name of the framework's function, as in "Trainer.save_model".
        weights_only: Whether parameters and buffers are all that is written, without the optimizer's state.
        on_all_ranks: Whether every rank makes the call, so that the ranks can agree. None where one rank may make it
            alone: then they agree only if each holds slices of the weights, which they have to write together.
        module: Module that is written. Default: the guarded one.
    """

    name: str
    weights_only: bool = False
    on_all_ranks: bool | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class BadValues:
    """What is not to be saved, on the lowest rank that has it.

    Attributes:
        first: First tensor that is not finite.
        count: Number of such tensors.
        names: Names of the first of them.
        total: Number of tensors that were read.
        before: Sentence on what the first one was like when the run was attached or loaded; "" if that is unknown.
    """

    first: Offender
    count: int
    names: tuple[str, ...]
    total: int
    before: str


class SaveCheck(NamedTuple):
    """Result of a check.

    Attributes:
        is_bad: Whether something is not to be saved, on any rank that makes the call.
        bad: The same on all of these ranks; None if there is none, or its name is too long to be sent.
        legal: Non-finite tensors of this rank that may be saved, and were not among those of an earlier check.
    """

    is_bad: bool = False
    bad: BadValues | None = None
    legal: Sequence[Offender] = ()


class _Values(NamedTuple):
    """What is not finite in a tensor: counts, and the first index."""

    nan: int
    pos_inf: int
    neg_inf: int
    first: tuple[int, ...]


class SaveGate:
    """Checks what one session's run is about to save.

    Args:
        model: The guarded model.
        ranks: Ranks that take part.
        probes: Parts of the guard, each contained on its own.

    Attributes:
        all_left: Whether no rank was on guard any more when they last agreed.
    """

    def __init__(self, model: GuardedModel, ranks: Ranks, probes: Probes) -> None:
        self._model = model
        self._ranks = ranks
        self._probes = probes
        self._items = {item.tensor: item for item in model.parameters}
        self._when = ""
        self._known: dict[tuple[str, str], _Values] = {}  # not finite when attached or loaded, by kind and name
        self._said: set[tuple[str, str]] = set()
        self._under_way: list[Save] = []
        self.all_left = False

    @property
    def has_other_ranks(self) -> bool:
        """Whether other ranks may wait for this one before a save."""
        return self._ranks.size > 1 and not self.all_left

    def remember(self, when: str, offenders: Iterable[Offender]) -> None:
        """Remembers what was not finite when the run was attached, or loaded: the offenders, and any buffer."""
        self._when = when
        buffers = [] if self._model.module is None else _persistent_buffers(self._model.module)
        found = [*offenders, *self._offenders(buffers)]
        self._known = {(offender.kind, offender.name): _values(offender) for offender in found}

    @contextlib.contextmanager
    def passed(self, save: Save) -> Iterator[None]:
        """Context of a save that was checked: what it calls to save the same is not checked again."""
        self._under_way.append(save)
        try:
            yield
        finally:
            self._under_way.pop()

    def check(self, save: Save, last_report: OverflowReport | None, is_on_guard: bool = True) -> SaveCheck:
        """Reads what is about to be saved, in one pass. Ranks agree as `save.on_all_ranks` says.

        Args:
            save: The save.
            last_report: The session's last report: what it blames is not legal.
            is_on_guard: Whether this rank still checks. Otherwise it only answers those that do.
        """
        if any(save.weights_only or not other.weights_only for other in self._under_way):
            return SaveCheck()
        weights = self._probes.run("check before saving", self._weights, save.module) or []
        together = save.on_all_ranks
        if together is None:
            together = any(item.is_shared_out for item in weights or self._model.parameters)
        if not is_on_guard:
            return self._answer() if together else SaveCheck()
        found = self._probes.run("check before saving", self._read, save, weights, last_report) or SaveCheck()
        return self._agree(found, _BAD if found.is_bad else _FINITE) if together else found

    def _weights(self, module: nn.Module | None) -> list[NamedTensor]:
        """The tensors to be written, as they are now: a module may have replaced its buffers."""
        if module is not None:
            parameters = [self._items.get(item.tensor, item) for item in named_parameters(module)]
            return [*parameters, *_persistent_buffers(module)]
        guarded = self._model.module
        return [*self._model.parameters, *([] if guarded is None else _persistent_buffers(guarded))]

    def _answer(self) -> SaveCheck:
        """Takes part for ranks that are still on guard, if there are any."""
        if not self.has_other_ranks:
            return SaveCheck()
        try:
            return self._agree(SaveCheck(), _LEFT)
        except RuntimeError:  # the process group is gone, and with it those that would wait
            self.all_left = True
            return SaveCheck()

    def _agree(self, found: SaveCheck, answer: int) -> SaveCheck:
        """The result of the lowest rank that has a bad one. One reduction, and three more if there is one."""
        device = self._model.device
        highest = self._ranks.highest(answer, device)
        self.all_left = highest == _LEFT
        if highest != _BAD:
            return found
        text = None if found.bad is None else json.dumps(encode(found.bad), ensure_ascii=False)
        text = self._ranks.first_text(text, device)
        return found._replace(is_bad=True, bad=None if text is None else decode(BadValues, json.loads(text)))

    def _read(self, save: Save, weights: Sequence[NamedTensor], last_report: OverflowReport | None) -> SaveCheck:
        legal, bad = self._read_weights(weights, last_report)
        total = len(weights)
        if not save.weights_only:
            legal_state, bad_state, tensors = self._read_state({item.name: item for item in legal})
            legal, bad, total = [*legal, *legal_state], [*bad, *bad_state], total + tensors
        unsaid = [item for item in legal if (item.kind, item.name) not in self._said]
        self._said.update((item.kind, item.name) for item in unsaid)
        if not bad:
            return SaveCheck(legal=unsaid)
        names = tuple(item.name for item in bad[:MAX_NAMES])
        values = BadValues(bad[0], len(bad), names, total, self._before(bad[0], last_report))
        return SaveCheck(True, values, unsaid)

    def _read_weights(
        self, weights: Sequence[NamedTensor], last_report: OverflowReport | None
    ) -> tuple[list[Offender], list[Offender]]:
        legal: list[Offender] = []
        bad: list[Offender] = []
        for offender in self._offenders(weights):
            was_so = self._was_so(offender) and not is_blamed(offender, last_report)
            (legal if was_so or is_mask(offender) else bad).append(offender)
        return legal, bad

    def _offenders(self, tensors: Sequence[NamedTensor]) -> list[Offender]:
        stats = scan_tensors(tensors)
        return [tensors[at].offender(stats, at, self._ranks.rank) for at in stats.bad_positions()]

    def _read_state(self, legal: dict[str, Offender]) -> tuple[list[Offender], list[Offender], int]:
        """Legal and bad tensors of the optimizer's state, and the number of all.

        Where a parameter's own values are legal, its master copy and its moments have no more of them.
        """
        scan = self._model.scan_state()
        stats = stats_of(self._model.parameters, scan.table, scan.pieces)
        found: tuple[list[Offender], list[Offender]] = ([], [])
        for position in stats.bad_positions():
            item = self._model.parameters[position]
            offender = replace(item.offender(stats, position, self._ranks.rank), kind="optimizer_state")
            tensors = sum(piece.parameter == position for piece in scan.pieces)
            weight = legal.get(offender.name)
            is_legal = self._was_so(offender) or (
                weight is not None and offender.nonfinite <= tensors * weight.nonfinite
            )
            found[not is_legal].append(offender)
        return *found, len(scan.pieces)

    def _was_so(self, offender: Offender) -> bool:
        """Whether it had as many non-finite values, or more, when the run was attached or loaded."""
        known, now = self._known.get((offender.kind, offender.name)), _values(offender)
        return (
            known is not None
            and known.first <= now.first
            and all(a >= b for a, b in zip(known[:3], now[:3], strict=True))
        )

    def _before(self, offender: Offender, last_report: OverflowReport | None) -> str:
        known = self._known.get((offender.kind, offender.name))
        if not self._when:
            return ""
        if known is None:
            return f"it was finite when {self._when}"
        if not self._was_so(offender):
            return f"other values of it were not finite when {self._when}"
        step = "" if last_report is None else f", and the report on step {last_report.step} blames it"
        return f"it was so already when {self._when}{step}"

    def finding(self, save: Save, offender: Offender) -> Finding:
        """Returns the finding on a tensor that may be saved because it is as it was."""
        message = f"{save.name} writes {offender}. It is not refused, because it was so already when {self._when}."
        return Finding("nonfinite", message, name=offender.name, offender=offender, severity="info")


def is_mask(offender: Offender) -> bool:
    """Returns whether it is a buffer with no other non-finite value than -Inf."""
    return offender.kind == "buffer" and offender.neg_inf == offender.nonfinite


def is_blamed(offender: Offender, report: OverflowReport | None) -> bool:
    """Returns whether a report names that very tensor as the cause."""
    if report is None or report.first is None or report.first.kind != offender.kind:
        return False
    return offender.name in (report.first.name, *report.first.aliases)


def report_on(
    check: SaveCheck,
    save: Save,
    last_report: OverflowReport | None,
    step: int,
    loss_scale: float,
    world_size: int,
) -> OverflowReport:
    """Returns the report on a save: the last one if it is about the same tensor, else a new one.

    Args:
        check: What was found.
        save: The save.
        last_report: The session's last report.
        step: Number of the last step.
        loss_scale: Loss scale of that step.
        world_size: Number of ranks.
    """
    bad = check.bad
    first = None if bad is None else bad.first
    what = "a tensor with a name too long to be sent" if bad is None else f"{bad.first}{_more(bad.count - 1)}"
    when = f"after step {step}" if step else "before any step"
    happened = f"{save.name} was about to write values that are not finite, {when}: {what}."
    if last_report is not None and first is not None and is_blamed(first, last_report):
        return replace(last_report, happened=happened)
    evidence = []
    if bad is not None:
        names = ", ".join(bad.names) + _more(bad.count - len(bad.names))
        evidence = [
            f"{bad.count} of {bad.total} tensors are not finite: {names}",
            *([bad.before] if bad.before else []),
        ]
    if last_report is None and step:
        evidence.append(
            "no step with non-finite gradients was seen: an update of the optimizer wrote it, or code outside of a step"
        )
    is_state = first is not None and first.kind == "optimizer_state"
    verdict = Verdict.OPTIMIZER_STATE_NONFINITE if is_state else Verdict.WEIGHTS_NONFINITE
    return OverflowReport(
        step=step,
        loss_scale=loss_scale,
        verdict=verdict,
        provisional=False,
        recoverable=CATALOG[verdict].recoverable,
        first=first,
        offenders=(),
        evidence=tuple(evidence),
        not_checked=("the optimizer's state, which is not written",) if save.weights_only else (),
        advice=_ADVICE,
        world_size=world_size,
        consecutive_skips=0,
        happened=happened,
    )


def _values(offender: Offender) -> _Values:
    return _Values(offender.nan, offender.pos_inf, offender.neg_inf, tuple(offender.index))


def _persistent_buffers(module: nn.Module) -> list[NamedTensor]:
    """The buffers that a state dict has."""
    written: set[torch.Tensor] = set()
    for part in module.modules():
        written.update(
            buffer
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set
        )
    return [item for item in named_buffers(module) if item.tensor in written]


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
