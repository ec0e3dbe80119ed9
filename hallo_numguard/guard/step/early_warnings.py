"""What goes wrong before anything overflows: spikes, a learning rate too high, dead and exploding layers, odd inputs.

Two rules look at the flight recorder's rows of every step, on the host, as they arrive. The others look at whole
tensors and cost launches, so they are asked at steps 1, 2, 4, 8 ... and at every 1024th: early in a run, where things
go wrong, and hardly ever later. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.ops.api import tensor_stats
from hallo_numguard.ops.device import Sent
from hallo_numguard.ops.layout import Layout

_WINDOW = 50  # steps that a spike is measured against
_ENOUGH = 20
_DEVIATIONS = 10.0  # robust ones
_EVERY = 1024
_SLICE = 1024  # elements of a parameter whose update is measured
_UPDATE_RATIO = 0.1  # healthy runs are near 0.001
_DEAD_SAMPLES = 3
_KEPT = 16  # samples of a parameter
_EXPLODING = 1000.0
_RANGE = 10.0
_QUIET = 100  # steps before the same is said again


class Watch:
    """Turns what it sees into findings.

    Args:
        parameters: In the session's order.
        batch: The calls of the step.
        tell: Takes a finding.
    """

    def __init__(self, parameters: Sequence[NamedTensor], batch: Batch, tell: Callable[[Finding], None]) -> None:
        self._parameters = parameters
        self._batch = batch
        self._tell = tell
        self._said: dict[tuple[str, str], int] = {}
        self._spikes = {"norm_spike": Spikes(least=0.1), "loss_spike": Spikes(least=0.05)}
        self._steps = 0
        self._updates = _Updates(parameters)
        self._now: _Sample | None = None
        self._under_way: deque[_Sample] = deque()
        self._zero_for: dict[int, list[int]] = {}  # samples in which a gradient was nothing but zeros
        self._norms: dict[int, deque[float]] = {}
        self._inputs: dict[str, _Range] = {}

    def before_step(self, step: int, loss_scale: float, packed: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Takes a sample, if this is a step for one."""
        self._steps += 1
        if self._steps & (self._steps - 1) and self._steps % _EVERY:
            return
        names, ranges = self._batch.ranges()
        inputs = torch.cat([ranges.counts.double(), ranges.absmax[:, None]], dim=1)
        self._now = _Sample(step, loss_scale, Sent(packed), pieces, names, Sent(inputs))
        self._updates.begin()

    def after_step(self, applied: bool, rows: Sequence[StepRecord]) -> None:
        """Completes the sample, and looks at whatever has arrived: `rows` are the steps that are new on the host."""
        if self._now is not None and applied:
            self._now.updates = self._updates.end()
            self._under_way.append(self._now)
        self._now = None
        for row in rows:
            if row.applied:
                self._look_for_spikes(row)
        while self._under_way and self._under_way[0].arrived:
            self._look_at(self._under_way.popleft())

    # -- every step --------------------------------------------------------------------------------------------------

    def _look_for_spikes(self, row: StepRecord) -> None:
        figures = {"norm_spike": row.norm / row.loss_scale, "loss_spike": row.loss}
        for kind, value in figures.items():
            median = None if value is None else self._spikes[kind].median_before(value)
            if median is not None:
                what = "gradient norm" if kind == "norm_spike" else "loss"
                self._say(
                    kind,
                    row.step,
                    f"{what} {value:.4g}, where the median of the steps before is {median:.4g}{_near(row)}",
                )

    # -- samples -----------------------------------------------------------------------------------------------------

    def _look_at(self, sample: _Sample) -> None:
        self._look_at_inputs(sample)
        self._look_at_gradients(sample)
        self._look_at_updates(sample)

    def _look_at_inputs(self, sample: _Sample) -> None:
        rows: list[list[float]] = sample.inputs.read().tolist()
        self._batch.allow([name for name, row in zip(sample.names, rows, strict=True) if any(row[:3])])
        for name, (*_, absmax) in zip(sample.names, rows, strict=True):
            known = self._inputs.setdefault(name, _Range())
            if known.samples >= _DEAD_SAMPLES and absmax > _RANGE * known.absmax > 0:
                self._say(
                    "input_range", sample.step, f"input {name} reaches {absmax:.4g}, before {known.absmax:.4g}", name
                )
            known.samples, known.absmax = known.samples + 1, max(known.absmax, absmax)

    def _look_at_gradients(self, sample: _Sample) -> None:
        figures = sample.gradients.read().view(torch.float64)[:, 6:].tolist()
        for piece, (absmax, sumsq) in zip(sample.pieces, figures, strict=True):
            if piece.parameter < 0 or piece.start > 0:  # a slice from the middle may well be rows that are not used
                continue
            self._look_at_gradient(sample.step, piece.parameter, absmax, math.sqrt(sumsq) / sample.loss_scale)

    def _look_at_gradient(self, step: int, position: int, absmax: float, norm: float) -> None:
        name = self._parameters[position].name
        zero = self._zero_for.setdefault(position, [])
        zero.append(step) if absmax == 0 else zero.clear()
        if len(zero) >= _DEAD_SAMPLES and step >= 1 << _DEAD_SAMPLES:
            steps = ", ".join(map(str, zero))
            self._say("dead_gradient", step, f"the gradient of {name} was zero throughout in steps {steps}", name)
        norms = self._norms.setdefault(position, deque(maxlen=_KEPT))
        if len(norms) > _DEAD_SAMPLES and norm > _EXPLODING * statistics.median(norms) > 0:
            usual = statistics.median(norms)
            self._say(
                "exploding_gradient", step, f"the gradient of {name} has norm {norm:.4g}, {usual:.4g} is usual", name
            )
        norms.append(norm)

    def _look_at_updates(self, sample: _Sample) -> None:
        if sample.updates is None:
            return
        before, change = sample.updates.read().view(torch.float64)[:, 7].sqrt().chunk(2)
        whole = float(before.norm())
        if whole > 0 and float(change.norm()) > _UPDATE_RATIO * whole:
            worst = int((change / before.clamp(min=whole / 1e6)).argmax())
            name = self._parameters[self._updates.positions[worst]].name
            self._say(
                "update_ratio",
                sample.step,
                f"one step changes the weights by {float(change.norm()) / whole:.2g} of what they are, most of all "
                f"{name} (0.001 is usual): the learning rate is too high",
                name,
            )

    def _say(self, kind: str, step: int, message: str, name: str = "") -> None:
        if step - self._said.get((kind, name), -_QUIET) >= _QUIET:
            self._said[kind, name] = step
            self._tell(Finding(kind, f"step {step}: {message}", step, name))


@dataclass
class _Sample:
    """What was sent to the host in one step."""

    step: int
    loss_scale: float
    gradients: Sent
    pieces: Sequence[Piece]
    names: list[str]
    inputs: Sent
    updates: Sent | None = None

    @property
    def arrived(self) -> bool:
        sent = (self.gradients, self.inputs, *([self.updates] if self.updates else []))
        return all(item.arrived for item in sent)


@dataclass
class _Range:
    """The largest absolute value that an input has had."""

    samples: int = 0
    absmax: float = 0.0


class _Updates:
    """How much a step changes the weights: the first elements of every matrix that is trained.

    Attributes:
        positions: Of the matrices among the parameters. Vectors are left out: biases begin at 0.
    """

    def __init__(self, parameters: Sequence[NamedTensor]) -> None:
        self._parameters = parameters
        self.positions = [
            position
            for position, item in enumerate(parameters)
            if item.tensor.requires_grad and len(item.tensor.shape if item.shape is None else item.shape) > 1
        ]
        self._before: torch.Tensor | None = None
        self._layout = Layout([0])

    def begin(self) -> None:
        """Copies them as they are."""
        if self.positions:
            self._before, self._layout = self._read()

    def end(self) -> Sent | None:
        """Sends the records of what they were, and then of how they changed."""
        if self._before is None:
            return None
        before, self._before = self._before, None
        change = self._read()[0] - before
        return Sent(torch.cat([tensor_stats(flat, self._layout).packed for flat in (before, change)]))

    def _read(self) -> tuple[torch.Tensor, Layout]:
        held = [self._parameters[position] for position in self.positions]
        flats = [(item.tensor if item.slice is None else item.slice()[0]).detach() for item in held]
        parts = [flat.reshape(-1)[:_SLICE].float() for flat in flats]
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.numel())
        return torch.cat(parts), Layout(offsets)


class Spikes:
    """Tells a figure that is far above what it used to be: more than 10 robust deviations above the median.

    Positive figures vary by factors, so it is their logarithms that are compared; a loss that falls below zero is
    compared as it is.

    Args:
        least: The smallest deviation, in parts of the figure: what hardly varies may do so once.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._seen: deque[float] = deque(maxlen=_WINDOW)

    def median_before(self, value: float) -> float | None:
        """Takes a figure in. Returns the median of those before if it is a spike."""
        if not math.isfinite(value):
            return None
        seen = list(self._seen)
        self._seen.append(value)
        if len(seen) < _ENOUGH or value <= max(seen):
            return None
        median = statistics.median(seen)
        if min(seen) > 0:
            is_spike = _stands_out(math.log(value), [math.log(item) for item in seen], self._least)
        else:
            is_spike = _stands_out(value, seen, self._least * abs(median))
        return median if is_spike else None


def _stands_out(value: float, seen: Sequence[float], least: float) -> bool:
    median = statistics.median(seen)
    spread = 1.4826 * statistics.median([abs(item - median) for item in seen])
    return value - median > _DEVIATIONS * max(spread, least)


def _near(row: StepRecord) -> str:
    if row.headroom is None:
        return ""
    nearest = max(row.parameters, key=lambda name: row.parameters[name].absmax, default="")
    return f"; {row.headroom:.1f} bits of headroom left, {nearest} is nearest" if nearest else ""
