"""The guard of a DeepSpeed engine (ZeRO stages 1 and 2).

Two methods of the optimizer instance are wrapped, and nothing else decides anything:

- `step`: before it, this rank's gradients are scanned in one pass; the result stays on the device.
- `_update_scale`: DeepSpeed calls it once a step, on every rank, with the overflow flag that all ranks have agreed on,
  while the gradients are still there. If the flag is up, the guard finds the origin and decides; a clean step costs
  nothing here, not even a synchronisation.

`backward` and `scale` of the engine are wrapped to keep a reference to the loss, `load_checkpoint` to look at what it
loaded. The loss scaler is left alone: it is pickled into checkpoints.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch

from hallo_numguard.config import GuardConfig, OverflowCallback
from hallo_numguard.errors import InvalidInput, NumericsError, UnsupportedDeepSpeed
from hallo_numguard.monitor import attribution, policy
from hallo_numguard.monitor.agreement import Ranks
from hallo_numguard.monitor.attribution import (
    LegalNonfinites,
    NamedTensor,
    ReadyOrder,
    bad_positions,
    only_negative_infinity,
)
from hallo_numguard.monitor.layout import Piece, Sums, by_parameter
from hallo_numguard.monitor.recorder import Recorder
from hallo_numguard.monitor.verdict import Evidence, Scaling, judge, settled
from hallo_numguard.ops.stats import multi_tensor_stats
from hallo_numguard.records import Finding, Offender, OverflowReport, StepRecord

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")

_guarded_engines: WeakSet[Any] = WeakSet()

_NEEDED = (
    "step",
    "_update_scale",
    "averaged_gradients",
    "bit16_groups",
    "dp_process_group",
    "first_offset",
    "loss_scaler",
    "overflow",
    "params_in_partition",
)

_NOT_YET = {
    "cpu_offload": "offload_optimizer",
    "has_moe_layers": "mixture-of-experts layers",
    "zenflow": "ZenFlow",
}

_OUTLOOK = {
    "parameter": "If the model reads it, the first loss will be NaN, and no loss scale can mend that.",
    "buffer": "If the forward pass reads it, the loss will be NaN.",
}


class DeepSpeedGuard:
    """What `attach` returns; see there.

    Attributes:
        last_report: The report on the last step whose gradients were not finite, or None. Replaced by one that is no
            longer provisional when a later step was finite.
        findings: Parameters and buffers that were not finite when the guard was attached, or after `load_checkpoint`.
    """

    def __init__(self, engine: Any, config: GuardConfig, on_overflow: OverflowCallback | None) -> None:
        _check_supported(engine)
        self.last_report: OverflowReport | None = None
        self.findings: list[Finding] = []
        self._engine = engine
        self._optimizer = engine.optimizer
        self._config = config
        self._on_overflow = on_overflow
        self._ranks = Ranks(self._optimizer.dp_process_group)
        self._parameters = attribution.named_parameters(engine.module)
        self._weights = [*self._parameters, *attribution.named_buffers(engine.module)]
        self._gradients = _GradientPieces(self._optimizer, self._parameters)
        self._legal = LegalNonfinites()
        self._known_buffers: set[int] = set()  # not finite before any forward pass of ours
        self._recorder = Recorder(config.history)
        self._order = ReadyOrder()
        self._order.learn(self._parameters)
        self._losses: list[torch.Tensor] = []  # of this step's micro-batches, detached
        self._packed = torch.empty((0, 8), dtype=torch.int64)  # this step's gradient records
        self._pieces: list[Piece] = []
        self._scaling = _scaling(self._optimizer)
        self._skipped = 0  # steps in a row
        self._to_raise: BaseException | None = None
        self._failed = False
        self._seams = _Seams()
        self._inspect_weights("attached")
        self._seams.wrap(self._optimizer, "step", self._step)
        self._seams.wrap(self._optimizer, "_update_scale", self._update_scale)
        self._seams.wrap(engine, "backward", self._backward)
        if hasattr(engine, "scale"):  # DeepSpeed >= 0.18.3, for loss.backward() by hand
            self._seams.wrap(engine, "scale", self._backward)
        self._seams.wrap(engine, "load_checkpoint", self._load_checkpoint)
        _guarded_engines.add(engine)

    @property
    def history(self) -> list[StepRecord]:
        """The flight recorder: the last steps of what this rank owns, oldest first. Synchronises with the device."""
        return self._recorder.read()

    def detach(self) -> None:
        """Takes the guard off. The engine is as it was before `attach`; reports and history stay readable."""
        self._seams.restore()
        self._order.stop()
        self._losses.clear()
        _guarded_engines.discard(self._engine)

    # -- the seams: what runs in place of DeepSpeed's methods --------------------------------------------------------

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._guarded(self._scan_gradients)
        result = original(*args, **kwargs)
        self._guarded(self._after_step)
        if self._to_raise is not None:
            error, self._to_raise = self._to_raise, None
            raise error
        return result

    def _update_scale(self, original: Callable[..., Any], has_overflow: bool = False) -> Any:
        if not has_overflow:
            return original(has_overflow)
        report = self._explain()
        if self._to_raise is not None:
            return None  # DeepSpeed now drops the gradients; the scale stays as it is
        try:
            return original(has_overflow)
        except Exception as error:
            if report is None:
                raise
            raise NumericsError(report) from error

    def _backward(self, original: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())
        return original(loss, *args, **kwargs)

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._guarded(lambda: self._inspect_weights("loaded from a checkpoint"))
        return result

    # -- a clean step --------------------------------------------------------------------------------------------

    def _scan_gradients(self) -> None:
        tensors, self._pieces = self._gradients.collect()
        self._packed = multi_tensor_stats(tensors).packed
        self._scaling = _scaling(self._optimizer)
        loss = self._losses[-1] if self._losses else None
        self._recorder.begin(self._step_number, self._scaling.scale, self._packed, loss)

    def _after_step(self) -> None:
        applied = not self._optimizer.overflow
        self._recorder.end(applied)
        self._losses.clear()
        self._order.stop()
        if not applied:
            return
        self._legal.clean_step()
        if self._skipped and self.last_report is not None:
            self.last_report = settled(self.last_report, self._scaling.scale, self._skipped)
            if self._ranks.rank == 0:
                _log.info("step %d is finite again: %s", self._step_number, self.last_report.advice)
        self._skipped = 0

    @property
    def _step_number(self) -> int:
        return int(self._engine.global_steps) + 1  # DeepSpeed counts a step when it is over

    # -- an overflow: every rank comes here, and takes part in every reduction -------------------------------------

    def _explain(self) -> OverflowReport | None:
        """Finds the origin, sets `last_report` and what `_step` will raise. None if the guard failed and is off now."""
        self._skipped += 1
        device = self._engine.device
        local = self._guarded(self._look)
        if self._anyone_failed(device):
            return None
        weights, weight_ranks = self._ranks.replicated(local.weights)
        gradients = self._ranks.sliced(local.gradients)
        loss_known = self._ranks.lowest(int(bool(self._losses)), device) == 1
        report = self._guarded(lambda: self._judge(weights, weight_ranks, gradients, loss_known))
        if self._anyone_failed(device):
            return None
        self.last_report = report
        self._to_raise = policy.agree(report, self._config.policy, self._on_overflow, self._ranks, device)
        return report

    def _look(self) -> _Local:
        everything = [*self._weights, self._loss_tensor()]
        gradients = by_parameter(self._packed, self._pieces, len(self._parameters))
        return _Local(attribution.look(everything), gradients)

    def _judge(self, weights: Sums, weight_ranks: torch.Tensor, gradients: Sums, loss_known: bool) -> OverflowReport:
        ranks = weight_ranks.tolist()
        suspects: list[Offender] = []
        bystanders: list[Offender] = []
        loss = None
        for position in bad_positions(weights):
            if position == len(self._weights):
                loss = self._loss_tensor().offender(weights, position, ranks[position])
                continue
            offender = self._weights[position].offender(weights, position, ranks[position])
            (suspects if self._may_be_origin(weights, position) else bystanders).append(offender)
        self._legal.note(weights)
        ready = self._order.sort(bad_positions(gradients))
        return judge(
            Evidence(
                step=self._step_number,
                skipped=self._skipped,
                scaling=self._scaling,
                suspects=suspects,
                bystanders=bystanders,
                tensors=len(self._weights),
                loss=loss,
                loss_known=loss_known,
                gradients=[self._gradient(gradients, position) for position in ready],
                world_size=self._ranks.size,
            )
        )

    def _may_be_origin(self, weights: Sums, position: int) -> bool:
        if self._legal.is_legal(weights, position):
            return False
        if self._weights[position].kind == "parameter":
            return True
        # A forward pass on a bad batch poisons running statistics: that is damage, unless it was there before. And
        # -Inf alone is how additive masks are written.
        return position in self._known_buffers and not only_negative_infinity(weights, position)

    def _gradient(self, gradients: Sums, position: int) -> Offender:
        rank = 0 if self._ranks.size == 1 else None
        parameter = self._parameters[position]
        return replace(parameter.offender(gradients, position, rank), kind="gradient")

    def _loss_tensor(self) -> NamedTensor:
        """The micro-batches' losses as one tensor, so that the index of an offender is the micro-batch."""
        losses = [loss.reshape(()).to(torch.float32) for loss in self._losses]
        if not losses:
            return NamedTensor("loss", "loss", torch.zeros((), device=self._engine.device))
        return NamedTensor("loss", "loss", losses[0] if len(losses) == 1 else torch.stack(losses))

    # -- weights outside of a step -----------------------------------------------------------------------------------

    def _inspect_weights(self, when: str) -> None:
        """Looks at this rank's copy of every parameter and buffer, and tells of those that are not finite."""
        sums = attribution.look(self._weights)
        self._legal.note(sums)
        self._known_buffers.clear()
        for position in bad_positions(sums):
            weight = self._weights[position]
            if weight.kind == "buffer":
                self._known_buffers.add(position)
                if only_negative_infinity(sums, position):
                    continue
            offender = weight.offender(sums, position, self._ranks.rank)
            finding = Finding(offender, f"{offender}, seen when {when}. {_OUTLOOK[weight.kind]}")
            self.findings.append(finding)
            _log.log(logging.WARNING if self._ranks.rank == 0 else logging.INFO, "%s", finding)

    # -- the guard's own failures --------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T]) -> T | Any:
        """Runs `work`; a failure of ours is logged once and never stops training."""
        if self._failed:
            return None
        try:
            return work()
        except Exception:  # noqa: BLE001 - whatever it is, training goes on
            self._failed = True
            _log.exception("hallo_numguard failed and will take itself off; training goes on")
            if self._ranks.size == 1:
                self.detach()
            return None

    def _anyone_failed(self, device: torch.device) -> bool:
        """Agrees whether all ranks are still well; if not, takes the guard off on all of them."""
        failed = self._ranks.highest(int(self._failed), device) > 0
        if failed:
            self.detach()
        return failed


class _Local(NamedTuple):
    """What one rank sees: its copy of the weights (and, as the last row, the loss), and its slice of the gradients."""

    weights: Sums
    gradients: Sums


class _GradientPieces:
    """Finds this rank's reduced gradients: scattered tensors, at new addresses every step, of the same sizes."""

    def __init__(self, optimizer: Any, parameters: list[NamedTensor]) -> None:
        self._optimizer = optimizer
        self._position = {item.tensor: position for position, item in enumerate(parameters)}
        self._pieces: list[Piece] = []
        self._sizes: list[int] = []

    def collect(self) -> tuple[list[torch.Tensor], list[Piece]]:
        """Returns the gradients, and what each of them is a piece of."""
        tensors: list[torch.Tensor] = []
        owners: list[tuple[int, int]] = []
        for group in range(len(self._optimizer.bit16_groups)):
            gradients = self._optimizer.averaged_gradients.get(group)
            if gradients is None:
                continue
            real = [item for item in gradients if not getattr(item, "_zero_padding", False)]
            # Older releases append the padding without a mark: it is what has no parameter.
            held = zip(self._optimizer.params_in_partition[group], real, strict=False)
            for index, (_, gradient) in enumerate(held):
                tensors.append(gradient)
                owners.append((group, index))
        sizes = [tensor.numel() for tensor in tensors]
        if sizes != self._sizes:
            self._pieces = [self._piece(*owner) for owner in owners]
            self._check(sizes)
            self._sizes = sizes
        return tensors, self._pieces

    def _piece(self, group: int, index: int) -> Piece:
        parameter = self._optimizer.params_in_partition[group][index]
        # Only a partition's first parameter can begin in its middle. A float before DeepSpeed 0.19.7.
        start = int(self._optimizer.first_offset[group]) if index == 0 else 0
        return Piece(self._position[parameter], start)

    def _check(self, sizes: list[int]) -> None:
        numel = {position: tensor.numel() for tensor, position in self._position.items()}
        for piece, size in zip(self._pieces, sizes, strict=True):
            if piece.start + size > numel[piece.parameter]:
                raise UnsupportedDeepSpeed(
                    f"DeepSpeed {_version()}: {type(self._optimizer).__name__}.averaged_gradients holds {size} "
                    f"elements from {piece.start} on for a parameter of {numel[piece.parameter]}: an unknown layout"
                )


class _Seams:
    """Methods of instances that are replaced for a while."""

    def __init__(self) -> None:
        self._active = True
        self._restore: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Lets `replacement(original, *args)` run in place of `owner.name(*args)`."""
        original = getattr(owner, name)

        @functools.wraps(original)  # learning-rate schedulers look at attributes of step
        def seam(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        before = vars(owner).get(name)

        def restore() -> None:
            if vars(owner).get(name) is not seam:
                return  # somebody wrapped it again: ours is now a way through
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, seam)
        self._restore.append(restore)

    def restore(self) -> None:
        """Puts every method back."""
        self._active = False
        while self._restore:
            self._restore.pop()()


def _scaling(optimizer: Any) -> Scaling:
    scaler = optimizer.loss_scaler
    return Scaling(
        scale=float(scaler.cur_scale),
        dynamic=bool(scaler.dynamic),
        minimum=float(getattr(scaler, "min_scale", 1.0)),
        patience=max(0, int(getattr(scaler, "cur_hysteresis", 1)) - 1),
    )


def _check_supported(engine: Any) -> None:
    if engine in _guarded_engines:
        raise InvalidInput("this engine is guarded already; call detach() on its guard first")
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if not any(base.__name__ == "DeepSpeedZeroOptimizer" for base in type(optimizer).__mro__):
        raise UnsupportedDeepSpeed(
            f"the guard works with ZeRO stages 1 and 2, this engine's optimizer is {kind}: "
            "set zero_optimization.stage to 1 or 2"
        )
    for name in _NEEDED:
        if not hasattr(optimizer, name):
            raise UnsupportedDeepSpeed(f"DeepSpeed {_version()}: {kind} has no attribute {name}")
    for name, what in _NOT_YET.items():
        if getattr(optimizer, name, False):
            raise UnsupportedDeepSpeed(f"the guard does not work with {what} yet")
    if getattr(optimizer, "model_parallel_world_size", 1) > 1:
        raise UnsupportedDeepSpeed("the guard does not work with model parallelism yet")


def _version() -> str:
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version"))
