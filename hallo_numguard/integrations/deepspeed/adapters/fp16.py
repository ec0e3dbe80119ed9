"""Stage 0 in half precision: FP16_Optimizer around fused optimizers, FP16_UnfusedOptimizer around all others.

| DeepSpeed's pass that is not made | how it gets the guard's result |
|---|---|
| `overflow_checker.has_overflow_serial(params)` | returns the flag of the table |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import GradientSource, ParameterGradients
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import (
    OptimizerAdapter,
    Part,
    Release,
    takes_bad_norm_for_overflow,
)
from hallo_numguard.integrations.patches import MethodPatches


class _Fp16Adapter(OptimizerAdapter):
    """Common base: every rank holds all of the gradients and of the state."""

    groups_attribute = "fp16_groups"
    required_attributes = ("_update_scale", "fp16_groups", "overflow")
    state_is_sliced = False

    def gradient_source(self) -> GradientSource:
        """Returns the whole `parameter.grad` of each parameter."""
        return ParameterGradients(lambda: self.optimizer.fp16_groups, self.positions)

    def loss_scaling(self) -> LossScaling:
        """Returns the state of the optimizer's loss scaler."""
        config = self._loss_scale_config
        return LossScaling(
            scale=float(config.cur_scale),
            dynamic=bool(getattr(config, "dynamic_loss_scale", False)),  # there in fp16 alone before 0.18.6
            minimum=float(getattr(config, "min_loss_scale", None) or 1.0),
        )

    @property
    def _loss_scale_config(self) -> Any:
        return getattr(self.optimizer, "loss_scale_config", self.optimizer)  # the optimizer itself before 0.18.6

    def checks_overflow(self) -> bool:
        """Returns whether an overflow skips the step: in bf16 it is found and has no effect from 0.17.1 to 0.19.7."""
        return takes_bad_norm_for_overflow() or bool(getattr(self._loss_scale_config, "use_grad_scaling", True))

    def updates_scale(self) -> bool:
        """Returns whether every step calls `_update_scale`, as those do in which an overflow has an effect."""
        return self.checks_overflow()

    def known_bugs(self, release: Release) -> Iterable[str]:
        """Yields the missing loss scaling of stage 0 in fp16 (0.18.3 to 0.19.8)."""
        if (0, 18, 3) <= release <= (0, 19, 8) and self.loss_scaling().scale != 1.0:
            yield (
                "at stage 0 in fp16 does not scale the loss in engine.backward, but divides the gradients by the "
                "scale: updates are far too small. Use ZeRO stage 1, or bf16."
            )

    def replace_passes(self, patches: MethodPatches) -> None:
        """Replaces the overflow check; the norm stays DeepSpeed's."""
        checker = getattr(self.optimizer, "overflow_checker", None)
        if hasattr(checker, "has_overflow_serial"):
            patches.wrap(checker, "has_overflow_serial", self._has_overflow)

    def _has_overflow(self, original: Callable[..., Any], params: Any) -> Any:
        return original(params) if self.scan is None else bool(self.scan.table.any_nonfinite())


class Fp16FusedAdapter(_Fp16Adapter):
    """`FP16_Optimizer`: one flat float32 master copy per group, its parameters one after the other."""

    class_names = ("FP16_Optimizer",)

    def state_parts(self) -> Iterator[Part]:
        """Yields each parameter's part of the flat moments and master copies."""
        optimizer = self.optimizer
        for flat, parameters in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            tensors = [flat, *self.flat_moments(optimizer.optimizer, flat)]
            begin = 0
            for parameter in parameters:
                end = begin + parameter.numel()
                for tensor in tensors:
                    yield tensor.view(-1)[begin:end], Piece(self.positions[parameter], 0)
                begin = end


class Fp16UnfusedAdapter(_Fp16Adapter):
    """`FP16_UnfusedOptimizer`: a float32 master copy of each parameter."""

    class_names = ("FP16_UnfusedOptimizer",)

    def state_parts(self) -> Iterator[Part]:
        """Yields the moments and the master copy of each parameter."""
        for masters, parameters in zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                position = self.positions[parameter]
                yield from self.whole_parts(self.optimizer.optimizer, master, position, is_master=True)
