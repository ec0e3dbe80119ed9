"""Looks at the weights right before and right after each of the optimizer's updates, to tell who wrote a bad one.

Both looks read the same weights: finite right before the update, and not right after it, is what the update wrote;
finite after one update, and not before the next, is what other code wrote. All weights are read where that costs next
to nothing (few and small ones) or where it matters (the first steps, the steps after an alarm, a setting of the
optimizer that is odd), else a part of them in turn: of 4 bytes that training holds for a weight, its gradient and two
moments, and that the optimizer moves seven times, a look reads an eighth of one. No host sync, no collective.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from hallo_numguard.guard.guarded_model import GuardedModel
from hallo_numguard.guard.parameter_stats import ParameterStats
from hallo_numguard.guard.readable import Reader, Scan
from hallo_numguard.guard.step.weight_parts import WeightParts, held
from hallo_numguard.ops.device import AsyncHostCopy
from hallo_numguard.ops.table import StatsTable

FULL_STEPS = 4  # after an attach or a load, after which settings and state are most often wrong
ALARM_STEPS = 20
MAX_GROUPS = 64  # beyond it only learning rates are looked at in every step
MAX_LOOKS = 8  # under way from the device to the host
GROWTH = 1e4  # of the largest element of a weight, or of 1, in one update
ATTACHED = 0  # stands for the scan at attach, or after a load, where else the number of a step does

Signature = tuple[int, int, int, int]
"""Counts of NaN, +Inf and -Inf, and the flat index of the first of them."""

Groups = Sequence[Mapping[str, Any]]


@dataclass
class WrittenWeight:
    """A trained weight that was seen to turn non-finite.

    Attributes:
        position: Position in the guard's list of parameters.
        by_update: Number of the step whose update wrote it: finite right before, and not right after; 0 if none.
        before_update: Number of the step before whose update it was not finite any more; 0 if that was not seen.
        finite_at: Number of the last step after whose update it was seen finite (or as it was when attached); 0 when
            attached or loaded; -1 if it never was.
        last_update: Number of the last step that had been applied by then.
        groups: The optimizer's parameter groups as they were at that update.
        gradients: Statistics of this rank's gradients in the step of that update; None if that update was not seen,
            or they were not scanned.
        seen: What was not finite then, in this rank's part of it.
    """

    position: int
    by_update: int = 0
    before_update: int = 0
    finite_at: int = -1
    last_update: int = 0
    groups: Groups = ()
    gradients: StatsTable | None = None
    seen: Signature = (0, 0, 0, 0)


class Growth(NamedTuple):
    """An update that made a weight absurdly large, though finite.

    Attributes:
        step: Number of the step.
        position: Position in the guard's list of parameters.
        before: Largest absolute value right before the update.
        after: Largest absolute value right after it.
        groups: The optimizer's parameter groups as they were.
    """

    step: int
    position: int
    before: float
    after: float
    groups: Groups


@dataclass(frozen=True)
class _Look:
    """A scan on its way to the host."""

    step: int
    is_after: bool
    part: int | None  # None for all
    scan: Scan
    packed: AsyncHostCopy
    groups: Groups
    gradients: StatsTable | None
    last_update: int


@dataclass
class _Known:
    """What the looks have shown so far."""

    bad: dict[int, Signature] = field(default_factory=dict)
    written: dict[int, WrittenWeight] = field(default_factory=dict)
    all_finite_at: int = -1  # or as they were
    part_finite_at: dict[int, int] = field(default_factory=dict)
    before_at: dict[int | None, int] = field(default_factory=dict)  # step of the last look before an update, by part


class UpdateWatch:
    """Tells which update of the optimizer, or that none, made a weight non-finite.

    Args:
        model: The guarded model.
        mode: "part", "all" or "never"; see `GuardConfig.check_updates`.

    Attributes:
        when: When all weights were read last outside of a step, as in "attached".
        last_update: Number of the last step that was applied.
    """

    def __init__(self, model: GuardedModel, mode: str) -> None:
        self._model = model
        self._mode = mode
        self._known = _Known()
        self._looks: deque[_Look] = deque()
        self._news: list[WrittenWeight] = []
        self._growths: list[Growth] = []
        self._before: tuple[int, StatsTable] | None = None  # step and figures of the last look before an update
        self._groups: Groups = ()
        self._is_odd = False
        self._fits: tuple[Any, bool] = (None, False)
        self._gradients: StatsTable | None = None
        self._part: int | None = None
        self._steps = 0
        self._full_until = FULL_STEPS
        self._looked = True
        self.when = ""
        self.last_update = 0
        self.parameters_were_added()

    def parameters_were_added(self) -> None:
        """Divides the weights anew into parts."""
        parameters = self._model.parameters
        held = {id(parameter) for group in self._model.optimizer.groups() for parameter in group.get("params", ())}
        own = {at for at, item in enumerate(parameters) if id(item.tensor) in held}
        # Where the optimizer holds flat copies, its own are not among them: then all that take gradients are.
        trained = own or {at for at, item in enumerate(parameters) if item.tensor.requires_grad}
        self._trained = sorted(
            at for at in trained if not is_lazy(parameters[at].tensor) and not parameters[at].is_on_disk
        )
        self._parts = WeightParts(parameters, self._trained, in_one=self._mode == "all")
        self._readers: dict[int | None, Reader] = {}
        self._dtypes = {parameters[at].tensor.dtype for at in self._trained}

    def weights_were_read(self, when: str, stats: ParameterStats) -> None:
        """Takes what was not finite outside of a step: when attached, or after a load."""
        self._looks.clear()
        self._news.clear()
        self.parameters_were_added()  # some may have got their shapes, or have been unfrozen
        bad = [at for at in stats.bad_positions() if at in self._parts.part_of]
        self._known = _Known(self._now(bad), all_finite_at=ATTACHED)
        self.when = when
        self._full_until = self._steps + FULL_STEPS

    def alarm(self) -> None:
        """Looks at all weights in the next steps."""
        self._full_until = max(self._full_until, self._steps + ALARM_STEPS)

    # -- a step ------------------------------------------------------------------------------------------------------

    def before(self, step: int, gradients: StatsTable | None) -> None:
        """Looks right before the update that a step may make."""
        if self._mode == "never" or not self._trained:
            return
        self._steps += 1
        self._looked = False
        self._gradients = gradients
        self._groups = _copies(self._model.optimizer.groups())
        self._is_odd = any(map(_has_nonfinite, self._groups[:MAX_GROUPS])) or not self._eps_fits()
        is_full = self._parts.count == 1 or self._steps <= self._full_until or self._is_odd
        self._part = None if is_full else self._steps % self._parts.count
        self._look(step, is_after=False)

    def after(self, step: int) -> None:
        """Looks right after the update. A second call in the same step does nothing."""
        if self._looked:
            return
        self._looked = True
        self.last_update = step
        self._look(step, is_after=True)

    def _look(self, step: int, is_after: bool) -> None:
        tensors = self._parts[self._part].tensors()
        scan = self._readers.setdefault(self._part, Reader()).scan(tensors)
        copy = AsyncHostCopy(scan.table.packed)
        self._looks.append(
            _Look(step, is_after, self._part, scan, copy, self._groups, self._gradients, self.last_update)
        )
        if len(self._looks) > MAX_LOOKS:
            self._take(self._looks.popleft())
        self._take_arrived()

    def _eps_fits(self) -> bool:
        """Whether every eps is above 0 in the dtypes of the weights. Computed when it changes."""
        eps = tuple(group.get("eps") for group in self._groups[:MAX_GROUPS])
        if self._fits[0] != eps:
            numbers = [value for value in eps if isinstance(value, float)]
            self._fits = (eps, all(fits(value, dtype) for value in numbers for dtype in self._dtypes))
        return self._fits[1]

    # -- what was seen -----------------------------------------------------------------------------------------------

    def news(self, wait: bool = False) -> list[WrittenWeight]:
        """Returns the weights that were seen to turn non-finite and were not returned before.

        Args:
            wait: Whether to wait for looks that are still on their way from the device.
        """
        self._take_arrived(wait)
        news, self._news = self._news, []
        return news

    def history_of(self, position: int) -> WrittenWeight | None:
        """Returns what is known of a trained weight that is not finite now; None if it was never looked at.

        What was seen of other values than it has now says nothing about these.
        """
        if position not in self._parts.part_of or self._mode == "never":
            return None
        self._take_arrived(wait=True)
        written, seen = self._known.written.get(position), self._known.bad.get(position)
        if seen is not None and seen != self._now([position]).get(position):
            return WrittenWeight(position, last_update=self.last_update, groups=self._groups)
        finite_at = self._finite_at(position)
        return written or WrittenWeight(position, 0, 0, finite_at, self.last_update, self._groups)

    def _now(self, positions: Sequence[int]) -> dict[int, Signature]:
        scan = Reader().scan([held(self._model.parameters[at]).detach() for at in positions])
        return _bad_ones(scan.table, scan.owners, positions)

    def trains(self, position: int) -> bool:
        """Returns whether the optimizer trains a parameter."""
        return position in self._parts.part_of

    def is_written(self, position: int) -> bool:
        """Returns whether an update was seen to make a parameter non-finite."""
        self._take_arrived(wait=True)
        written = self._known.written.get(position)
        return written is not None and written.by_update > 0

    @property
    def total(self) -> int:
        """Number of weights that it looks at."""
        return len(self._trained)

    def first_bad_element(self, position: int) -> int:
        """Returns the flat index, in this rank's part of a weight, of its first value that is not finite; or -1."""
        return self._known.bad.get(position, (0, 0, 0, -1))[3]

    def was_bad_from_the_start(self, position: int) -> bool:
        """Returns whether a trained weight was not finite when attached or loaded, and has not changed since."""
        return position in self._known.bad and position not in self._known.written

    def _finite_at(self, position: int) -> int:
        parts = [self._known.part_finite_at.get(part, -1) for part in self._parts.part_of[position]]
        return max(self._known.all_finite_at, min(parts))

    def _take_arrived(self, wait: bool = False) -> None:
        while self._looks and (wait or self._looks[0].packed.arrived):
            self._take(self._looks.popleft())

    def _take(self, look: _Look) -> None:
        table = StatsTable(look.packed.read(), False)
        if self._known.bad or bool(table.any_nonfinite()):
            self._take_bad(look, table)
        known = self._known
        if look.is_after and self._before is not None and self._before[0] == look.step:
            self._take_growth(look, self._before[1], table)
        self._before = None if look.is_after else (look.step, table)
        if not look.is_after:
            known.before_at[look.part] = look.step
        elif look.part is None:
            known.all_finite_at = look.step
        else:
            known.part_finite_at[look.part] = look.step

    def _take_growth(self, look: _Look, before: StatsTable, after: StatsTable) -> None:
        grown = after.absmax > GROWTH * before.absmax.clamp(min=1.0)
        if not bool(grown.any()):
            return
        row = int((after.absmax * grown).argmax())
        stretches = self._parts[look.part].stretches
        position = stretches[look.scan.owners[row]].position
        sizes = float(before.absmax[row]), float(after.absmax[row])
        self._growths.append(Growth(look.step, position, *sizes, look.groups))

    def growths(self) -> list[Growth]:
        """Returns the updates that made a weight absurdly large, and were not returned before."""
        growths, self._growths = self._growths, []
        return growths

    def _take_bad(self, look: _Look, table: StatsTable) -> None:
        stretches = self._parts[look.part].stretches
        found = _bad_ones(table, look.scan.owners, [stretch.position for stretch in stretches])
        whole = {stretch.position for stretch in stretches if stretch.stop is None}
        starts = {stretch.position: stretch.start for stretch in stretches}
        for position in whole.intersection(self._known.bad).difference(found):  # mended since
            del self._known.bad[position]
            self._known.written.pop(position, None)
        for position, signature in found.items():
            known = self._known.bad.get(position)
            if known is not None and (position not in whole or known == signature):
                continue
            if position not in whole:
                nan, pos_inf, neg_inf, first = signature
                as_seen = nan, pos_inf, neg_inf, starts[position] + first
                signature = self._now([position]).get(position, as_seen)
            self._known.bad[position] = signature
            if position in self._known.written:
                continue  # who wrote its first bad values counts
            written = WrittenWeight(
                position,
                finite_at=self._finite_at(position),
                last_update=look.last_update,
                groups=look.groups,
                seen=signature,
            )
            if look.is_after:
                written.gradients = look.gradients
            if not look.is_after:
                written.before_update = look.step
            elif self._known.before_at.get(look.part) == look.step:
                written.by_update = look.step
            self._known.written[position] = written
            self._news.append(written)


def fits(value: float, dtype: torch.dtype) -> bool:
    """Returns whether a number above 0 is above 0 in a dtype as well; True of dtypes that do no arithmetic."""
    if value <= 0 or not dtype.is_floating_point or dtype.itemsize < 2:
        return value > 0 or not dtype.is_floating_point
    return float(torch.tensor(value, dtype=torch.float64).to(dtype)) > 0


def numbers_in(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a setting, each under its name, as in "betas[0]". Not those on a device."""
    if isinstance(value, (bool, str)) or value is None:
        return
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, torch.Tensor):
        if value.numel() == 1 and value.device.type == "cpu":
            yield name, float(value)
    elif isinstance(value, (tuple, list)) and name != "params":
        for place, item in enumerate(value[:4]):
            yield from numbers_in(f"{name}[{place}]", item)


def _has_nonfinite(group: Mapping[str, Any]) -> bool:
    return any(not math.isfinite(number) for name, value in group.items() for number in _numbers(name, value))


def _numbers(name: str, value: Any) -> Iterable[float]:
    if type(value) is float:  # most of them are
        return (value,)
    return () if name == "param_names" else (number for _, number in numbers_in(name, value))


def _copies(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as they are now: a scheduler writes into a learning rate that is a tensor."""
    copies = [dict(group) for group in groups]
    for group in copies:
        group.pop("params", None)
        rate = group.get("lr")
        if isinstance(rate, torch.Tensor):
            group["lr"] = rate.detach().clone()
    return copies


def _bad_ones(table: StatsTable, owners: Sequence[int], positions: Sequence[int]) -> dict[int, Signature]:
    """What is not finite, by position. A tensor of a wrapper subclass has several rows."""
    found: dict[int, Signature] = {}
    counts, first = table.nonfinite_counts, table.first_nonfinite
    for row in (first >= 0).nonzero().flatten().tolist():
        position = positions[owners[row]]
        nan, pos_inf, neg_inf = counts[row].tolist()
        before = found.get(position, (0, 0, 0, int(first[row])))
        found[position] = (before[0] + nan, before[1] + pos_inf, before[2] + neg_inf, before[3])
    return found
