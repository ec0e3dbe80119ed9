"""The guard of a DeepSpeed engine: when to look, and how a step is skipped.

Two methods of the optimizer instance are wrapped, and nothing else decides anything:

- `step`: before it, this rank's gradients are scanned in one pass; the result stays on the device.
- `_update_scale`: where it exists, DeepSpeed calls it once a step, on every rank, with the overflow flag that all ranks
  have agreed on. If the flag is up, the guard finds the origin and decides; a clean step costs nothing here, not even a
  synchronisation. Optimizers that skip without a word to it (bf16) are asked for `overflow` after the step.

`backward` and `scale` of the engine are wrapped to keep a reference to the loss, `load_checkpoint` to look at what it
loaded, and `step`, where there is a keeper, to go back to a checkpoint when the step is over. The loss scaler is left
alone: it is pickled into checkpoints.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.errors import InvalidInput, NumericsError
from hallo_numguard.core.findings import Finding
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard import named_tensors as attribution
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import Forward, Model, Scanned
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations.deepspeed.engine import (
    call_module,
    kind_for,
    known_bad,
    parameters_of,
    settings_of,
    told_not_to_look,
)
from hallo_numguard.integrations.deepspeed.monitor import monitor_sinks
from hallo_numguard.integrations.deepspeed.replace import Replacement
from hallo_numguard.integrations.deepspeed.state import is_sliced, scan_state
from hallo_numguard.integrations.deepspeed.version import version
from hallo_numguard.integrations.patches import Seams

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")

_guarded_engines: WeakSet[Any] = WeakSet()


class DeepSpeedGuard:
    """What `attach` returns; see there.

    Args:
        engine: A `deepspeed.DeepSpeedEngine`.
        config, on_overflow: See `attach`.
        again: Calls the model once more with what the engine was called with, where `engine.module` does not.
    """

    def __init__(
        self, engine: Any, config: GuardConfig, on_overflow: OverflowCallback | None, again: Forward | None = None
    ) -> None:
        if engine in _guarded_engines:
            raise InvalidInput("this engine is guarded already; call detach() on its guard first")
        self._engine = engine
        self._optimizer = engine.optimizer
        self._kind = kind_for(engine)
        self._ranks = Ranks(getattr(self._optimizer, "dp_process_group", None))
        parameters = parameters_of(engine.module)
        positions = {item.tensor: position for position, item in enumerate(parameters)}
        self._gradients = self._kind.source(self._optimizer, positions)
        buffers = attribution.named_buffers(engine.module)
        model = Model(
            parameters,
            buffers,
            sliced_gradients=self._gradients.sliced,
            scan_state=lambda: scan_state(self._optimizer, positions),
            sliced_state=is_sliced(self._optimizer),
            device=torch.device(engine.device),
            module=engine.module,
            forward=again or functools.partial(call_module, engine),
            settings=settings_of(engine),
            can_go_back=lambda: True,
        )
        self._session = Session(model, self._ranks, config, on_overflow, monitor_sinks(engine))
        self._config = config
        self._looks = self._kind.looks(self._optimizer)  # else nobody does but the guard
        self._enforces = config.policy.enforce or not told_not_to_look(engine)
        self._explained = False  # whether this step's overflow was
        self._skipped_here = False  # by the guard itself, of an optimizer that knows of no overflow
        self._scanned_early: Scanned | None = None
        self._to_raise: BaseException | None = None
        self._seams = Seams()
        for fault in known_bad(engine, version()):
            _log.warning("%s", fault)
        self._session.inspect_weights("attached")
        self._wrap()
        self._replacement = Replacement(self._optimizer, self._seams) if config.mode == "replace" else None
        _guarded_engines.add(engine)

    def _wrap(self) -> None:
        self._seams.wrap(self._optimizer, "step", self._step)
        if hasattr(self._optimizer, "_update_scale"):
            self._seams.wrap(self._optimizer, "_update_scale", self._update_scale)
        if self._config.keeper is not None:
            self._seams.wrap(self._engine, "step", self._engine_step)
        self._seams.wrap(self._engine, "forward", self._forward)
        self._seams.wrap(self._engine, "backward", self._backward)
        if hasattr(self._engine, "scale"):  # DeepSpeed >= 0.18.3, for loss.backward() by hand
            self._seams.wrap(self._engine, "scale", self._backward)
        self._seams.wrap(self._engine, "load_checkpoint", self._load_checkpoint)
        if hasattr(self._engine, "clip_fp32_gradients"):  # stage 0 in float32: a NaN norm makes every gradient NaN
            self._seams.wrap(self._engine, "clip_fp32_gradients", self._clip)

    @property
    def last_report(self) -> OverflowReport | None:
        """The report on the last step whose gradients were not finite, or None.

        Replaced by one that is no longer provisional when a later step was finite.
        """
        return self._session.last_report

    @property
    def findings(self) -> list[Finding]:
        """What was noticed that is no overflow, or not yet; see `Finding`. The last 1000."""
        return self._session.findings

    @property
    def history(self) -> list[StepRecord]:
        """The flight recorder: the last steps of what this rank owns, oldest first. Waits for the last row's copy."""
        return self._session.history()

    def detach(self) -> None:
        """Takes the guard off. The engine is as it was before `attach`; reports and history stay readable."""
        self._seams.restore()
        self._session.stop()
        _guarded_engines.discard(self._engine)

    # -- the seams: what runs in place of DeepSpeed's methods --------------------------------------------------------

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._explained = self._skipped_here = False
        if not self._looks and hasattr(self._optimizer, "overflow"):
            self._optimizer.overflow = False  # DeepSpeed would leave what the guard has set
        scanned = self._scanned_early or self._session.guarded(self._before_step)
        self._scanned_early = None
        if self._replacement is not None:
            self._replacement.begin(scanned)
        if not self._looks and not hasattr(self._optimizer, "_update_scale"):
            self._skipped_here = self._found_by_us()
        try:
            result = None if self._skipped_here else original(*args, **kwargs)
        except BaseException:
            self._guarded(lambda: self._session.after_step(applied=False))
            raise
        finally:
            if self._replacement is not None:
                self._replacement.end()
        self._take_off_if_failed(everywhere=self._ranks.size == 1)
        if self._overflowed:
            if not self._explained:
                self._explain()
            self._guarded(self._gradients.drop)
        self._guarded(lambda: self._session.after_step(applied=not self._overflowed))
        if self._to_raise is not None:
            error, self._to_raise = self._to_raise, None
            raise error
        return result

    def _update_scale(self, original: Callable[..., Any], has_overflow: bool = False) -> Any:
        if not has_overflow and not self._looks and self._found_by_us():
            # DeepSpeed reads the flag again after this call, and then drops the gradients.
            has_overflow = self._optimizer.overflow = True
        if not has_overflow:
            return original(has_overflow)
        if not self._explained:
            self._explain()
        if self._to_raise is not None or self._session.goes_back or self._session.keeps_scale:
            return None  # DeepSpeed now drops the gradients; the scale stays as it is
        try:
            return original(has_overflow)
        except Exception as error:
            report = self._session.last_report
            if report is None or self._session.failed:
                raise
            raise NumericsError(report) from error

    def _engine_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._session.go_back(self._engine)  # not before: the engine counts a step when it is over
        return result

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._guarded(lambda: self._session.saw_call(args, kwargs))
        output = original(*args, **kwargs)
        self._guarded(lambda: self._session.saw_output(output))
        return output

    def _backward(self, original: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._session.saw_loss(loss)
        return original(loss, *args, **kwargs)

    def _clip(self, original: Callable[..., Any]) -> Any:
        self._scanned_early = self._session.guarded(self._before_step)
        if self._replacement is None or self._scanned_early is None or self._engine.mpu is not None:
            return original()
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return self._replacement.clip(
            self._scanned_early, gradients, float(self._engine.gradient_clipping()), self._ranks
        )

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._guarded(lambda: self._session.inspect_weights("loaded from a checkpoint"))
        return result

    # -- what they do ------------------------------------------------------------------------------------------------

    def _before_step(self) -> Scanned:
        scaling = self._kind.scaling(self._optimizer)
        step = int(self._engine.global_steps) + 1  # DeepSpeed counts a step when it is over
        scanned = self._gradients.scan()
        self._session.before_step(step, scaling, scanned)
        return scanned

    @property
    def _overflowed(self) -> bool:
        return self._skipped_here or bool(getattr(self._optimizer, "overflow", False))

    def _found_by_us(self) -> bool:
        """Looks in DeepSpeed's place, and explains what is found. Returns whether the step is to be skipped."""
        found = self._session.found_inf()
        if found:
            self._explain(skipped=self._enforces)
        self._take_off_if_failed(everywhere=True)
        return found and self._enforces and not self._session.failed

    def _explain(self, skipped: bool = True) -> None:
        self._explained = True
        self._to_raise = self._session.overflow(skipped)
        self._take_off_if_failed(everywhere=True)

    def _guarded(self, work: Callable[[], T]) -> T | None:
        result = self._session.guarded(work)
        self._take_off_if_failed(everywhere=self._ranks.size == 1)
        return result

    def _take_off_if_failed(self, everywhere: bool) -> None:
        """After a failure of our own; only where all ranks do so."""
        if self._session.failed and everywhere:
            self.detach()
