"""Warnings before anything overflows: spikes, a learning rate too high, dead and exploding layers, odd inputs.

Two rules read the flight recorder's rows of every step, on the host, as they arrive. The others read whole tensors and
cost launches, so they run at steps 1, 2, 4, 8 ... and at every 1024th: early in a run, where things go wrong, and
rarely later. No host sync.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import StepRecord
from hallo_numguard.core.safe_text import listed
from hallo_numguard.guard.containment import Probes
from hallo_numguard.guard.guarded_model import GuardedModel, ScannedPieces
from hallo_numguard.guard.module_groups import by_module
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.readable import is_plain
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.dead_gradients import DeadGradients
from hallo_numguard.guard.step.routing import Routing
from hallo_numguard.guard.step.updates import numbers_in
from hallo_numguard.ops.api import tensor_stats
from hallo_numguard.ops.device import AsyncHostCopy
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.table import StatsTable

SPIKE_WINDOW = 50  # steps that a spike is measured against
MIN_SPIKE_SAMPLES = 20
SPIKE_DEVIATIONS = 10.0  # robust standard deviations
SAMPLE_INTERVAL = 1024
UPDATE_SLICE = 1024  # elements of a parameter whose update is measured
MAX_MEASURED = 1024  # parameters: a sample takes some 10 us for each
MAX_UPDATE_RATIO = 0.1  # healthy runs are near 0.001
MIN_SAMPLES = 3
NORM_SAMPLES_KEPT = 16  # samples of a parameter
EXPLODING_RATIO = 1000.0  # to the median of the samples before
GROWTH_RATIO = 100.0  # to the largest: gradients behind a gate that begins at zero grow, but not at once
INPUT_RANGE_RATIO = 10.0
MIN_REPRESENTATIVE = 3  # parameters of which only the first elements are measured
LOST_SAMPLES = 2  # samples in a row without any change of any weight
# The same in half precision, where a rate that is being warmed up may well be lost, and where the rate is 0, as in the
# first two steps of DeepSpeed's WarmupLR.
WARM_UP_SAMPLES = 4
COOLDOWN_STEPS = 100  # steps before the same warning comes again


class EarlyWarnings:
    """Turns figures of clean steps into findings.

    Args:
        model: The guarded model.
        batch: Calls of the pending step.
        last_steps: Returns the last steps, with the figures of each parameter.
        on_finding: Called with each finding.
        probes: Containment of failures in the user's forward pass.
    """

    def __init__(
        self,
        model: GuardedModel,
        batch: Batch,
        last_steps: Callable[[], Sequence[StepRecord]],
        on_finding: Callable[[Finding], None],
        probes: Probes,
    ) -> None:
        self._has_masters = model.has_masters
        self._optimizer = model.optimizer
        self._parameters = parameters = model.parameters
        self._batch = batch
        self._on_finding = on_finding
        self._said: dict[tuple[str, str], int] = {}
        self._spikes = {"norm_spike": Spikes(min_deviation=0.1), "loss_spike": Spikes(min_deviation=0.05)}
        self._steps = 0
        self._updates = _Updates(parameters)
        self._now: _Sample | None = None
        self._pending_samples: deque[_Sample] = deque()
        self._dead = DeadGradients(parameters, model.module, last_steps, partial(self._report, "dead_gradient"))
        self._routing = Routing(model.routers, probes, self._warn)
        self._norms: dict[int, deque[float]] = {}
        self._inputs: dict[str, _Range] = {}
        self._unchanged: dict[int, list[int]] = {}  # samples whose step did not change the parameter
        self._all_unchanged: list[int] = []

    def start(self) -> None:
        """Puts the hooks on the routers of a mixture of experts, and looks at their first step."""
        self._routing.start()
        self._routing.listen()

    def stop(self) -> None:
        """Takes the hooks off."""
        self._routing.stop()

    def parameters_were_added(self) -> None:
        """Measures the updates of parameters that now follow the known ones as well."""
        self._pending_samples.clear()  # of the known ones alone
        self._updates = _Updates(self._parameters)

    def before_step(self, step: int, loss_scale: float, gradients: ScannedPieces) -> None:
        """Takes a sample, if one is due."""
        self._steps += 1
        if not _is_sampled(self._steps):
            return
        names, ranges = self._batch.ranges()
        inputs = torch.cat([ranges.counts.double(), ranges.absmax[:, None]], dim=1)
        self._now = _Sample(
            step,
            loss_scale,
            AsyncHostCopy(gradients.table.packed),
            gradients.pieces,
            names,
            AsyncHostCopy(inputs),
            _learns(self._optimizer.groups()),
            routed=self._routing.heard(),
        )
        self._updates.begin()

    def after_step(self, applied: bool, rows: Sequence[StepRecord]) -> None:
        """Completes the sample, and checks `rows`, the steps that are new on the host."""
        if self._now is not None and applied:
            self._now.updates = self._updates.end()
            self._pending_samples.append(self._now)
        self._now = None
        for row in rows:
            if row.applied:
                self._check_for_spikes(row)
        while self._pending_samples and self._pending_samples[0].arrived:
            self._check(self._pending_samples.popleft())
        if _is_sampled(self._steps + 1):
            self._routing.listen()

    # -- every step --------------------------------------------------------------------------------------------------

    def _check_for_spikes(self, row: StepRecord) -> None:
        figures = {"norm_spike": row.norm / row.loss_scale, "loss_spike": row.loss}
        for kind, value in figures.items():
            median = None if value is None else self._spikes[kind].median_before(value)
            if median is not None:
                what = "gradient norm" if kind == "norm_spike" else "loss"
                self._warn(
                    kind,
                    row.step,
                    f"{what} {value:.4g}, where the median of the steps before is {median:.4g}{_near(row)}",
                )

    # -- samples -----------------------------------------------------------------------------------------------------

    def _check(self, sample: _Sample) -> None:
        self._check_inputs(sample)
        if sample.routed is not None:
            names, figures = sample.routed
            self._routing.check(sample.step, names, figures.read().tolist())
        self._check_gradients(sample)
        self._check_updates(sample)

    def _check_inputs(self, sample: _Sample) -> None:
        rows: list[list[float]] = sample.inputs.read().tolist()
        self._batch.tolerate([name for name, row in zip(sample.names, rows, strict=True) if any(row[:3])])
        for name, (*_, absmax) in zip(sample.names, rows, strict=True):
            known = self._inputs.setdefault(name, _Range())
            if known.samples >= MIN_SAMPLES and absmax > INPUT_RANGE_RATIO * known.absmax > 0:
                self._warn(
                    "input_range", sample.step, f"input {name} reaches {absmax:.4g}, before {known.absmax:.4g}", name
                )
            known.samples, known.absmax = known.samples + 1, max(known.absmax, absmax)

    def _check_gradients(self, sample: _Sample) -> None:
        absmax: dict[int, float] = {}
        exploding: dict[int, tuple[float, float]] = {}
        table = StatsTable(sample.gradients.read(), False)
        figures = zip(table.absmax.tolist(), table.sumsq.tolist(), strict=True)
        for piece, (largest_value, sumsq) in zip(sample.pieces, figures, strict=True):
            if piece.parameter < 0 or piece.start > 0:  # a slice from the middle may well be rows that are not used
                continue
            absmax[piece.parameter] = max(largest_value, absmax.get(piece.parameter, 0.0))
            norm = math.sqrt(sumsq) / sample.loss_scale
            usual, largest = self._norms_before(piece.parameter, norm)
            if usual > 0 and norm > max(EXPLODING_RATIO * usual, GROWTH_RATIO * largest):
                exploding[piece.parameter] = norm, usual
        self._dead.check(sample.step, absmax)
        self._tell_exploding(sample.step, exploding, absmax)

    def _norms_before(self, position: int, norm: float) -> tuple[float, float]:
        """Adds a norm; returns the median and the largest of those before, 0 if they are too few."""
        norms = self._norms.setdefault(position, deque(maxlen=NORM_SAMPLES_KEPT))
        before = (statistics.median(norms), max(norms)) if len(norms) > MIN_SAMPLES else (0.0, 0.0)
        norms.append(norm)
        return before

    def _tell_exploding(
        self, step: int, exploding: Mapping[int, tuple[float, float]], known: Mapping[int, float]
    ) -> None:
        if not exploding:
            return
        found = {self._parameters[position].name: figures for position, figures in exploding.items()}
        for module, names in by_module(list(found), [self._parameters[at].name for at in known]).items():
            worst = max(names, key=lambda name: found[name][0] / found[name][1])
            norm, usual = found[worst]
            what = f"the gradient of {worst} has norm {norm:.4g}, {usual:.4g} is usual"
            if len(names) > 1:
                what += f"; {len(names)} parameters of {module or 'the model'} are as far from theirs"
            self._warn("exploding_gradient", step, what, names[0] if len(names) == 1 else module)

    def _check_updates(self, sample: _Sample) -> None:
        if sample.updates is None:
            return
        before, change = StatsTable(sample.updates.read(), False).sumsq.sqrt().chunk(2)
        self._check_size(sample.step, before, change)
        self._check_for_lost_updates(sample, change)

    def _check_size(self, step: int, before: torch.Tensor, change: torch.Tensor) -> None:
        matrices = self._updates.is_matrix
        before, change = before[matrices], change[matrices]
        whole = float(before.norm())
        if whole > 0 and float(change.norm()) > MAX_UPDATE_RATIO * whole:
            worst = int((change / before.clamp(min=whole / 1e6)).argmax())
            name = self._parameters[self._updates.positions[int(matrices.nonzero()[worst])]].name
            self._warn(
                "update_ratio",
                step,
                f"one step changes the weights by {float(change.norm()) / whole:.2g} of what they are, most of all "
                f"{name} (0.001 is usual): the learning rate is too high",
                name,
            )

    def _check_for_lost_updates(self, sample: _Sample, change: torch.Tensor) -> None:
        """Warns of steps that were made, and changed nothing."""
        absmax = StatsTable(sample.gradients.read(), False).absmax.tolist()
        moving = {piece.parameter for piece, size in zip(sample.pieces, absmax, strict=True) if size > 0}
        measured = moving.intersection(self._updates.positions)
        size_of = dict(zip(self._updates.positions, change.tolist(), strict=True))
        unchanged = {at for at in measured if size_of[at] == 0}
        if self._has_masters and self._updates.has_halves:
            return
        if unchanged != measured:
            self._all_unchanged.clear()
            self._check_for_stuck_vectors(sample.step, unchanged)
            return
        if not self._updates.are_representative(measured):
            return
        self._all_unchanged.append(sample.step)
        is_warm_up = self._updates.has_halves or not sample.learns
        if len(self._all_unchanged) >= (WARM_UP_SAMPLES if is_warm_up else LOST_SAMPLES):
            steps = ", ".join(map(str, self._all_unchanged))
            reason = "the learning rate is 0 in every parameter group"
            if sample.learns:
                reason = (
                    "look at the learning rate, at the optimizer's eps, and at clipping (a norm of Inf makes every "
                    "gradient 0)"
                )
            self._warn("lost_update", sample.step, f"steps {steps} were applied, and changed no weight: {reason}")

    def _check_for_stuck_vectors(self, step: int, unchanged: set[int]) -> None:
        """Warns of vectors in half precision whose updates are always rounded away, such as weights of norms at 1."""
        stuck = unchanged.intersection(self._updates.half_vectors)
        self._unchanged = {at: [*self._unchanged.get(at, []), step] for at in sorted(stuck)}
        names = [self._parameters[at].name for at, steps in self._unchanged.items() if len(steps) >= WARM_UP_SAMPLES]
        if names:
            dtype = str(self._parameters[min(self._unchanged)].tensor.dtype).removeprefix("torch.")
            self._warn(
                "lost_update",
                step,
                f"{listed(names)} have gradients, and do not change: their updates are smaller than what "
                f"{dtype} can add to them. Keep a master copy in float32 (autocast), or raise the learning rate",
                names[0],
            )

    def _warn(self, kind: str, step: int, message: str, name: str = "") -> None:
        if step - self._said.get((kind, name), -COOLDOWN_STEPS) >= COOLDOWN_STEPS:
            self._said[kind, name] = step
            self._report(kind, step, message, name)

    def _report(self, kind: str, step: int, message: str, name: str = "") -> None:
        self._on_finding(Finding(kind, f"step {step}: {message}", step, name))


def _is_sampled(step: int) -> bool:
    """Whether a step, counted from 1, is one of 1, 2, 4, 8 ... or every 1024th."""
    return not step & (step - 1) or step % SAMPLE_INTERVAL == 0


def _learns(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any learning rate is other than 0, as one on a device, which is not waited for, may be."""
    rates = [[number for _, number in numbers_in("lr", group.get("lr"))] for group in groups]
    return not rates or any(not numbers or any(numbers) for numbers in rates)


@dataclass
class _Sample:
    """Figures of one step on their way to the host, and whether any learning rate was other than 0."""

    step: int
    loss_scale: float
    gradients: AsyncHostCopy
    pieces: Sequence[Piece]
    names: list[str]
    inputs: AsyncHostCopy
    learns: bool
    updates: AsyncHostCopy | None = None
    routed: tuple[Sequence[str], AsyncHostCopy] | None = None  # names of routers, and their figures

    @property
    def arrived(self) -> bool:
        sent = [self.gradients, self.inputs, *([self.updates] if self.updates else [])]
        sent += [self.routed[1]] if self.routed else []
        return all(item.arrived for item in sent)


@dataclass
class _Range:
    """The largest absolute value that an input has had."""

    samples: int = 0
    absmax: float = 0.0


class _Updates:
    """How much a step changes the weights, measured on the first elements of every trained matrix, or of some of many.

    Vectors are measured where they are of half precision: theirs may be lost when they are rounded.

    Attributes:
        positions: Positions of the measured parameters among all. Tensors that the kernels cannot read as they are have
            none.
        is_matrix: Whether each of them is a matrix. Biases begin at 0, so the size of their change says nothing.
        half_vectors: Positions of the vectors.
        has_halves: Whether any is of half precision.
    """

    def __init__(self, parameters: Sequence[NamedTensor]) -> None:
        self._parameters = parameters
        trained = [
            (at, item) for at, item in enumerate(parameters) if item.tensor.requires_grad and is_plain(item.held()[0])
        ]
        halves = {at for at, item in trained if item.tensor.dtype in (torch.float16, torch.bfloat16)}
        matrices = {at for at, item in trained if len(item.whole_shape) > 1}
        measured = [at for at, _ in trained if at in matrices or at in halves]
        self.positions = measured[:: -(-len(measured) // MAX_MEASURED) or 1]
        self.is_matrix = torch.tensor([at in matrices for at in self.positions], dtype=torch.bool)
        self.half_vectors = halves - matrices
        self.has_halves = bool(halves)
        self._before: torch.Tensor | None = None
        self._layout = Layout([0])

    def are_representative(self, positions: set[int]) -> bool:
        """Returns whether the first elements of these parameters stand for all: those of an embedding may be unused."""
        sizes = [math.prod(self._parameters[at].whole_shape) for at in positions]
        return len(sizes) >= MIN_REPRESENTATIVE or any(size <= UPDATE_SLICE for size in sizes)

    def begin(self) -> None:
        """Copies the elements before the step."""
        if self.positions:
            self._before, self._layout = self._read()

    def end(self) -> AsyncHostCopy | None:
        """Starts the copy of the records to the host: those of the old elements, then those of their changes."""
        if self._before is None:
            return None
        before, self._before = self._before, None
        change = self._read()[0] - before
        return AsyncHostCopy(torch.cat([tensor_stats(flat, self._layout).packed for flat in (before, change)]))

    def _read(self) -> tuple[torch.Tensor, Layout]:
        held = [self._parameters[position] for position in self.positions]
        flats = [item.held()[0].detach() for item in held]
        parts = [flat.reshape(-1)[:UPDATE_SLICE].float() for flat in flats]
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.numel())
        return torch.cat(parts), Layout(offsets)


class Spikes:
    """Detects a figure far above its usual values: more than 10 robust deviations above the median.

    Positive figures vary by factors, so their logarithms are compared; a loss below zero is compared directly.

    Args:
        min_deviation: Smallest deviation that counts, relative to the figure: constant figures raise no alarm.
    """

    def __init__(self, min_deviation: float) -> None:
        self._min_deviation = min_deviation
        self._seen: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def median_before(self, value: float) -> float | None:
        """Adds a figure. Returns the median of the earlier ones if it is a spike."""
        if not math.isfinite(value):
            return None
        seen = list(self._seen)
        self._seen.append(value)
        if len(seen) < MIN_SPIKE_SAMPLES or value <= max(seen):
            return None
        median = statistics.median(seen)
        if min(seen) > 0:
            is_spike = _stands_out(math.log(value), [math.log(item) for item in seen], self._min_deviation)
        else:
            is_spike = _stands_out(value, seen, self._min_deviation * abs(median))
        return median if is_spike else None


def _stands_out(value: float, seen: Sequence[float], min_deviation: float) -> bool:
    median = statistics.median(seen)
    spread = 1.4826 * statistics.median([abs(item - median) for item in seen])
    return value - median > SPIKE_DEVIATIONS * max(spread, min_deviation)


def _near(row: StepRecord) -> str:
    if row.headroom is None:
        return ""
    nearest = max(row.parameters, key=lambda name: row.parameters[name].absmax, default="")
    return f"; {row.headroom:.1f} bits of headroom left, {nearest} is nearest" if nearest else ""
