"""The guard of a DeepSpeed engine: when it scans, and how a step is skipped.

Two methods of the optimizer instance are wrapped, and decide everything:

- `step`: before it, this rank's gradients are scanned in one pass; the result stays on the device.
- `_update_scale`: where it exists, DeepSpeed calls it once a step, on every rank, with the overflow flag that all ranks
  have agreed on. If the flag is set, the guard finds the origin and decides; a clean step costs nothing here, no host
  sync either. Optimizers that skip without calling it (bf16) are asked for `overflow` after the step.

`backward` and `scale` of the engine are wrapped to keep a reference to the loss, `load_checkpoint` to scan the loaded
weights, `save_checkpoint` and `save_16bit_model` to check what they are about to write, and `step`, with a keeper, to
go back to a checkpoint after the step. The loss scaler is not wrapped: it is
pickled into checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import torch

from hallo_numguard.core.config import GuardConfig, OverflowCallback
from hallo_numguard.core.errors import InvalidInput, NumericsError
from hallo_numguard.guard.feeding_modules import Also, named_modules
from hallo_numguard.guard.guard import Guard
from hallo_numguard.guard.guarded_model import Forward, GuardedModel, ScannedPieces, no_remarks
from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor, named_buffers
from hallo_numguard.guard.save_gate import Save
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations import engine_of
from hallo_numguard.integrations.backward_calls import LossObserver
from hallo_numguard.integrations.deepspeed.adapters import adapter_class, adapter_for
from hallo_numguard.integrations.deepspeed.adapters.plain import clip
from hallo_numguard.integrations.deepspeed.autocast import scaler_of_engine
from hallo_numguard.integrations.deepspeed.engine import (
    call_module,
    overflow_check_disabled,
    parameters_of,
    recover,
    settings_of,
)
from hallo_numguard.integrations.deepspeed.experts import Experts, routers_of
from hallo_numguard.integrations.deepspeed.monitor import monitor_sinks
from hallo_numguard.integrations.deepspeed.parallel import clips_over, figures_of, is_pipeline, ranks_of, with_shards
from hallo_numguard.integrations.deepspeed.pipeline import Pipeline, ScheduleHooks, call_stage, stage_parameters
from hallo_numguard.integrations.deepspeed.unsupported import check_supported
from hallo_numguard.integrations.deepspeed.update_view import engine_view
from hallo_numguard.integrations.deepspeed.version import release, version
from hallo_numguard.integrations.patches import MethodPatches, replaced
from hallo_numguard.integrations.save_gates import SaveGates
from hallo_numguard.integrations.torch_optim.grad_scaler import set_found_inf

_log = logging.getLogger("hallo_numguard")

P = ParamSpec("P")
T = TypeVar("T")

ON_NVME = "they are on NVMe but while their module is called"

_guarded_engines: WeakSet[Any] = WeakSet()


class DeepSpeedGuard(Guard):
    """The guard of an engine; see `hallo_numguard.attach`.

    Args:
        engine: A `deepspeed.DeepSpeedEngine`.
        config, on_overflow: See `attach`.
        forward: Calls the model once more with the engine's arguments. Default: a call of `engine.module`.
        losses_divided_by: Number by which each micro-batch's loss was divided before `engine.backward` gets it.
        step_number: Returns the framework's number of the step under way. Default: the engine counts.
        also: See `attach`.

    Attributes:
        saves: Checks before the engine saves.
    """

    def __init__(
        self,
        engine: Any,
        config: GuardConfig,
        on_overflow: OverflowCallback | None,
        forward: Forward | None = None,
        losses_divided_by: int = 1,
        step_number: Callable[[], int] | None = None,
        also: Also = (),
    ) -> None:
        if engine in _guarded_engines:
            raise InvalidInput("this engine is guarded already; call detach() on its guard first")
        if not is_pipeline(engine):
            check_supported(engine)
        feeding = named_modules(also)
        self._ranks = ranks_of(engine)
        pipeline = self._pipeline = Pipeline(engine, self._ranks) if is_pipeline(engine) else None
        self._engine = engine
        self._optimizer = engine.optimizer
        self._losses_divided_by = losses_divided_by
        self._step_number = step_number or self._count_of_engine
        self._experts = Experts(engine)
        parameters, buffers = self._listed_parameters(), named_buffers(engine.module)
        self._adapter = adapter_for(engine.optimizer, {item.tensor: at for at, item in enumerate(parameters)})
        self._adapter.names = [item.name for item in parameters]
        for item in parameters:
            if item.is_on_disk:
                self._adapter.unchecked.add(item.name, item.tensor, ON_NVME)
        self._adapter.scaler = self._scaler = scaler_of_engine(engine)
        self._stepper = self._optimizer if self._scaler is None else self._scaler  # what the engine calls
        self._gradients = self._adapter.gradient_source()
        self._figures = (
            figures_of(engine, parameters, self._ranks, self._experts, self._gradients.is_sliced)
            if pipeline is None
            else pipeline.figures(parameters, self._gradients.is_sliced)
        )
        call = functools.partial(call_module if pipeline is None else call_stage, engine)
        model = GuardedModel(
            parameters,
            self._experts.listed(buffers) if pipeline is None else pipeline.listed("buffer", buffers),
            sliced_gradients=self._gradients.is_sliced,
            scan_state=self._adapter.scan_state,
            sliced_state=self._adapter.state_is_sliced,
            has_masters=self._adapter.has_masters,
            device=torch.device(engine.device),
            module=engine.module,
            forward=forward or call,
            forward_compiled=forward or call,
            recover=functools.partial(recover, engine),
            settings=settings_of(engine),
            can_go_back=lambda: True,
            called_directly=lambda: replaced(engine, "forward", lambda *a, **k: call_module(engine, a, k)),
            is_compiled=lambda: bool(getattr(engine, "is_compiled", False)),
            unchecked=self._adapter.unchecked,
            optimizer=engine_view(self._adapter),
            exchanges_figures=self._gradients.is_sliced or self._figures is not None,
            in_global_names=self._experts.in_global_names,
            also=feeding,
            run_facts={"framework": "DeepSpeed", "zero_stage": int(engine.zero_optimization_stage())},
            stage=None if pipeline is None else pipeline.stage,
            remarks=no_remarks if pipeline is None else pipeline.remarks,
            routers=routers_of(engine),
        )
        self._session = Session(model, self._ranks, config, on_overflow, monitor_sinks(engine, self._step_number))
        is_whole = self._ranks.place is None or pipeline is not None or self._adapter.checks_elements()
        self._checks_overflow = is_whole and self._adapter.checks_overflow()  # else only the guard does
        self._enforces = config.policy.enforce or not overflow_check_disabled(engine)
        self._steps = 0  # the engine's own count goes back with a checkpoint
        self._explained = False  # whether this step's overflow was explained
        self._skipped_here = False  # by the guard itself; the optimizer has found no overflow
        self._was_loaded = False  # a checkpoint, by `on_overflow`
        self._scanned_early: ScannedPieces | None = None
        self._is_stepping = False
        self._is_in_step = False  # from the scan of the gradients to the end of the optimizer's step
        self._leaves = False  # at the end of the step
        self._to_raise: BaseException | None = None
        for bug in self._adapter.known_bugs(release()):
            _log.warning("DeepSpeed %s %s", version(), bug)
        self._schedule = None if pipeline is None else ScheduleHooks(engine, self._session, self._on_backward)
        self._patches = MethodPatches()
        self._answers = MethodPatches()  # after `detach`
        self._figure_answers = MethodPatches()  # likewise
        self.saves = SaveGates(self._sessions, config.keeper, lambda run: engine_of(run) is engine)
        with contextlib.ExitStack() as undo:
            undo.callback(self.detach)
            undo.callback(self.saves.remove)
            self._losses = LossObserver(self._session)
            self._session.inspect_weights("attached")
            self._patch(goes_back=config.keeper is not None)
            self._replaces = config.mode == "replace" and self._replace_passes()
            _guarded_engines.add(engine)
            undo.pop_all()

    def _patch(self, goes_back: bool) -> None:
        engine, optimizer, patches = self._engine, self._optimizer, self._patches
        patches.wrap(self._stepper, "step", self._step)
        if self._scaler is not None:
            patches.wrap(self._scaler, "unscale_", self._unscale)
        if hasattr(optimizer, "_update_scale"):
            patches.wrap(optimizer, "_update_scale", self._update_scale)
        if goes_back:
            patches.wrap(engine, "step" if self._pipeline is None else "train_batch", self._engine_step)
        if self._schedule is not None:
            self._schedule.start()
        else:
            patches.observe(engine, "forward", self._on_forward_start, self._session.on_forward_end)
            patches.observe(engine, "backward", self._on_backward)
        if hasattr(engine, "scale"):  # DeepSpeed >= 0.18.3, for loss.backward() by hand
            patches.observe(engine, "scale", self._on_backward)
        patches.observe(engine, "load_checkpoint", after=self._on_checkpoint_loaded)
        if hasattr(engine, "clip_fp32_gradients"):  # stage 0 in float32: a NaN norm makes every gradient NaN
            patches.wrap(engine, "clip_fp32_gradients", self._clip)
        self.saves.add(engine, "save_checkpoint", lambda *_, **__: Save("DeepSpeedEngine.save_checkpoint", False, True))
        # Below stage 3 nothing is reduced in it, so a script may call it on one rank alone.
        self.saves.add(engine, "save_16bit_model", lambda *_, **__: Save("DeepSpeedEngine.save_16bit_model", True))

    def _replace_passes(self) -> bool:
        reason = self._adapter.reason_to_observe()
        if self._pipeline is not None:
            reason = reason or self._pipeline.reason_to_observe()
        elif self._ranks.place is not None:
            reason = "under tensor parallelism some parameters are held by several ranks, and count once in the norm"
        if reason is not None:
            _log.info("hallo_numguard observes and replaces nothing: %s", reason)
            return False
        self._adapter.replace_passes(self._patches)
        return True

    def _sessions(self) -> Sequence[Session]:
        return [self._session]

    def wrap_step(self, step: Callable[P, T]) -> Callable[P, T]:
        """Returns the function with its calls recorded; see `Guard`.

        In a pipeline, returns it as it is: the guard knows the loss function, and no step may be made again.
        """
        return step if self._pipeline is not None else super().wrap_step(step)

    def detach(self) -> None:
        """Removes the guard. The engine is as it was before `attach`; reports and history stay readable.

        Where only guards check gradients, or each rank holds a slice of them, others may still wait for this rank: it
        answers them until all are off. Inside of the optimizer's step, as in `on_overflow`, it takes effect at its end.
        """
        if self._is_in_step:
            self._leaves = True
        else:
            self._take_off()

    def _take_off(self) -> None:
        answers = self._ranks.size > 1 and self._engine in _guarded_engines
        self._patches.restore()
        if self._schedule is not None:
            self._schedule.stop()
        self.saves.leave()
        self._losses.stop()
        self._session.stop()
        _guarded_engines.discard(self._engine)
        if answers and not self._checks_overflow:
            owner = self._stepper if self._checking_method == "step" else self._optimizer
            self._answers.wrap(owner, self._checking_method, self._answer)
        if answers and (self._gradients.is_sliced or self._figures is not None):
            self._figure_answers.wrap(self._stepper, "step", self._answer_figures)

    @property
    def _checking_method(self) -> str:
        """Name of the optimizer's method in which the guard checks in DeepSpeed's place."""
        return "_update_scale" if self._adapter.updates_scale() else "step"

    def _answer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Takes part in the check of the ranks that are still on guard; skips what they skip."""
        if self._checking_method == "_update_scale" and (args or tuple(kwargs.values()))[:1] == (True,):
            return original(*args, **kwargs)  # DeepSpeed has found it on every rank, and no guard asks
        agreed = self._session.answer()
        if agreed is None:
            self._answers.restore()
        is_skipped = bool(agreed) and self._enforces
        if hasattr(self._optimizer, "overflow") and (is_skipped or self._checking_method == "step"):
            self._optimizer.overflow = is_skipped  # DeepSpeed reads it again
        if not is_skipped:
            return original(*args, **kwargs)
        self._tell_scaler(lowers=True)
        self._session.essential("drop of the gradients", self._gradients.drop)
        return original(True) if self._checking_method == "_update_scale" else None

    def _answer_figures(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Takes part in the figures of the ranks that are still on guard."""
        if not self._session.answer_figures():
            self._figure_answers.restore()
        return original(*args, **kwargs)

    # -- patches in place of, before and after DeepSpeed's methods -------------------------------------------------

    @contextlib.contextmanager
    def _in_step(self, ends_here: bool) -> Iterator[None]:
        """Puts a `detach` off to the end of the step, which is here, or where something is raised."""
        self._is_in_step, is_over = True, True
        try:
            yield
            is_over = ends_here
        finally:
            if is_over:
                self._is_in_step, self._scanned_early = False, None
            if is_over and self._leaves:
                self._leaves = False
                self._take_off()

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._in_step(ends_here=True):
            return self._guarded_step(original, *args, **kwargs)

    def _guarded_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._explained = self._skipped_here = self._was_loaded = False
        self._steps += 1
        if not self._checks_overflow and hasattr(self._optimizer, "overflow"):
            self._optimizer.overflow = False  # DeepSpeed would leave what the guard has set
        scan, self._scanned_early = self._scanned_early or self._scan(), None
        if self._replaces:
            self._adapter.begin_step(scan)
        if not self._checks_overflow and self._checking_method == "step":
            self._skipped_here = self._found_by_guard()
            if self._skipped_here and hasattr(self._optimizer, "overflow"):
                self._optimizer.overflow = True
            if self._skipped_here:
                self._tell_scaler(lowers=not (self._session.goes_back or self._session.keeps_scale))
        self._is_stepping = True
        try:
            result = None if self._skipped_here else original(*args, **kwargs)
        except BaseException:
            self._session.after_step(applied=False)
            raise
        finally:
            self._is_stepping = False
            self._adapter.end_step()
        self._take_off_if_failed(everywhere=self._ranks.size == 1)
        applied = not self._overflowed
        if not applied:
            if not self._explained:
                self._explain()
                self._mark_overflow()
            self._session.essential("drop of the gradients", self._gradients.drop)
        self._session.after_step(applied)
        if applied:
            self._to_raise = self._session.check_update() or self._to_raise
        self._to_raise = self._to_raise or self._session.take_error()
        if self._to_raise is not None:
            error, self._to_raise = self._to_raise, None
            raise error
        return result

    def _unscale(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Scans before the gradients are divided, which the engine does to clip them, or else the scaler's step."""
        if self._is_stepping:
            return original(*args, **kwargs)
        with self._in_step(ends_here=False):
            self._scanned_early = self._scanned_early or self._scan()
            return original(*args, **kwargs)

    def _tell_scaler(self, lowers: bool) -> None:
        """Tells the GradScaler of a step that is not made, so that its update lowers the scale, or keeps it."""
        if self._scaler is not None:
            self._session.essential("search for the loss scale", set_found_inf, self._scaler, self._optimizer, lowers)

    def _update_scale(self, original: Callable[..., Any], has_overflow: bool = False) -> Any:
        if not has_overflow and not self._checks_overflow and self._found_by_guard():
            # DeepSpeed reads the flag again after this call, and then drops the gradients.
            has_overflow = self._optimizer.overflow = True
        if not has_overflow:
            return original(has_overflow)
        if not self._explained:
            self._explain()
        self._mark_overflow()
        is_kept = self._was_loaded or self._session.goes_back or self._session.keeps_scale
        if self._to_raise is not None or is_kept:
            return None  # DeepSpeed now drops the gradients; the scale stays unchanged
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

    def _on_forward_start(self, *args: Any, **kwargs: Any) -> None:
        self._session.on_forward_start(args, kwargs)

    def _on_backward(self, loss: Any, *_: Any, scale_wrt_gas: bool = True, **__: Any) -> None:
        self._session.losses_are_shares = not scale_wrt_gas  # as transformers.Trainer divides by itself
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            undivided = loss if self._losses_divided_by == 1 else loss.detach() * self._losses_divided_by
            self._losses.show(undivided, is_certain=True)

    def _mark_overflow(self) -> None:
        """Sets the optimizer's flag again, which a checkpoint that `on_overflow` has loaded has put to its own."""
        if self._was_loaded and hasattr(self._optimizer, "overflow"):
            self._optimizer.overflow = True

    def _on_checkpoint_loaded(self, _: Any) -> None:
        self._was_loaded = True
        self._session.inspect_weights("loaded from a checkpoint")

    def _clip(self, original: Callable[..., Any]) -> Any:
        if self._scaler is not None:
            return original()
        with self._in_step(ends_here=False):
            return self._clip_scanned(original)

    def _clip_scanned(self, original: Callable[..., Any]) -> Any:
        self._scanned_early = self._scan()
        is_ours = self._replaces and not self._experts.are_parted and clips_over(self._engine, self._ranks)
        if not is_ours or self._scanned_early is None:
            return original()
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        # DeepSpeed clips the model's parameters, which need not be the optimizer's, and leaves sparse gradients as
        # they are.
        if len(gradients) != len(self._scanned_early.table) or any(gradient.is_sparse for gradient in gradients):
            return original()
        return clip(self._scanned_early, gradients, float(self._engine.gradient_clipping()), self._ranks)

    # -- what they do ------------------------------------------------------------------------------------------------

    def _scan(self) -> ScannedPieces | None:
        step = self._step_number()
        scaling = self._session.essential("search for the loss scale", self._adapter.loss_scaling) or UNSCALED
        scan = self._session.essential("scan of the gradients", self._scan_gradients, step, scaling)
        if scan is None:
            self._session.begin_unscanned(step, scaling)
        return scan

    def _count_of_engine(self) -> int:
        return int(self._engine.global_steps) + 1  # DeepSpeed counts a step when it is over

    def _scan_gradients(self, step: int, scaling: LossScaling) -> ScannedPieces:
        self._session.probes.run("record of the loss", self._losses.begin_step)
        scan = self._gradients.scan()
        if self._gradients.has_unknown and self._pipeline is None:  # whose ranks have one list
            self._session.probes.run("addition of parameters", self._add_parameters)
            scan = self._gradients.scan()
        whole = None if self._figures is None else self._session.probes.run("flight recorder", self._figures, scan)
        self._session.before_step(step, scaling, scan, whole)
        return scan

    def _listed_parameters(self) -> list[NamedTensor]:
        """The parameters in an order that is the same on all ranks."""
        if self._pipeline is not None:
            return self._pipeline.listed("parameter", stage_parameters(self._engine))
        groups = adapter_class(self._optimizer).parameter_groups(self._optimizer)
        return self._experts.listed(with_shards(self._engine, parameters_of(self._engine.module, groups)))

    def _add_parameters(self) -> None:
        """Guards the parameters of groups that were added to the optimizer."""
        positions, groups = self._adapter.positions, self._adapter.parameter_groups(self._optimizer)
        found = with_shards(self._engine, parameters_of(self._engine.module, groups))
        new = self._experts.listed(item for item in found if item.tensor not in positions)
        self._session.add_parameters(new)
        positions.update({item.tensor: len(positions) + place for place, item in enumerate(new)})
        self._adapter.names += [item.name for item in new]

    @property
    def _overflowed(self) -> bool:
        return self._skipped_here or bool(getattr(self._optimizer, "overflow", False))

    def _found_by_guard(self) -> bool:
        """Checks in DeepSpeed's place, and explains an overflow. Returns whether the step is to be skipped."""
        found = self._session.found_inf()
        if found:
            self._explain(skipped=self._enforces)
        self._take_off_if_failed(everywhere=True)
        return found and self._enforces and not self._session.failed

    def _explain(self, skipped: bool = True) -> None:
        self._explained = True
        self._to_raise = self._session.overflow(self._steps, skipped)
        self._take_off_if_failed(everywhere=True)

    def _take_off_if_failed(self, everywhere: bool) -> None:
        """Removes the guard after a failure of its own, on all ranks together."""
        if self._session.failed and everywhere:
            self.detach()
