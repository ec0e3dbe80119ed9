"""What the guard needs to know of an engine, by the class of its optimizer: a row a class, and no `if` elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hallo_numguard.core.errors import UnsupportedDeepSpeed
from hallo_numguard.guard import named_tensors as attribution
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.integrations.deepspeed import gradients
from hallo_numguard.integrations.deepspeed.gradients import GradientSource, Positions
from hallo_numguard.integrations.deepspeed.partition import slice_of
from hallo_numguard.integrations.deepspeed.version import kind_of, require


@dataclass(frozen=True)
class Kind:
    """A class of DeepSpeed's optimizers.

    Attributes:
        classes: Names of the class, or of one that it is derived from.
        needs: Attributes without which the guard cannot work.
        source: Makes the source of its gradients.
        scaling: Reads its loss scaler.
        looks: Whether it looks at all for what is not finite, as it is configured.
    """

    classes: tuple[str, ...]
    needs: tuple[str, ...]
    source: Callable[[Any, Positions], GradientSource]
    scaling: Callable[[Any], LossScaling]
    looks: Callable[[Any], bool] = lambda _: True


def _zero_scaling(optimizer: Any) -> LossScaling:
    scaler = optimizer.loss_scaler
    return LossScaling(
        scale=float(scaler.cur_scale),
        dynamic=bool(scaler.dynamic),
        minimum=float(getattr(scaler, "min_scale", 1.0)),
        patience=max(0, int(getattr(scaler, "cur_hysteresis", 1)) - 1),
    )


def _fp16_scaling(optimizer: Any) -> LossScaling:
    config = getattr(optimizer, "loss_scale_config", optimizer)  # a part of the optimizer itself before 0.18.6
    return LossScaling(
        scale=float(config.cur_scale),
        dynamic=bool(config.dynamic_loss_scale),
        minimum=float(getattr(config, "min_loss_scale", None) or 1.0),
    )


def _no_scaling(_: Any) -> LossScaling:
    return LossScaling(1.0, dynamic=False)


def _checks_norm() -> bool:
    """Whether this DeepSpeed takes a norm that is not finite for an overflow (>= 0.19.8)."""
    return hasattr(sys.modules.get("deepspeed.runtime.utils"), "is_invalid_grad_norm")


def _zero12_looks(optimizer: Any) -> bool:
    if getattr(optimizer, "check_grad_overflow", True):
        return True
    return _checks_norm() and optimizer.dtype != torch.bfloat16 and getattr(optimizer, "compute_grad_norm", True)


def _zero3_looks(optimizer: Any) -> bool:
    return optimizer.dtype == torch.float16 or _checks_norm()


def _zero12_source(optimizer: Any, positions: Positions) -> GradientSource:
    if optimizer.cpu_offload:
        return gradients.offloaded_partitions(optimizer, positions)
    return gradients.PartitionLists(optimizer, positions)


KINDS = (
    Kind(
        ("DeepSpeedZeroOptimizer_Stage3",),
        ("_update_scale", "dp_process_group", "fp16_groups", "grad_partitions_flat_buffer", "loss_scaler", "overflow"),
        gradients.partition_buffer,
        _zero_scaling,
        _zero3_looks,
    ),
    Kind(
        ("DeepSpeedZeroOptimizer",),
        (
            "_update_scale",
            "averaged_gradients",
            "bit16_groups",
            "cpu_offload",
            "dp_process_group",
            "first_offset",
            "loss_scaler",
            "overflow",
            "params_in_partition",
        ),
        _zero12_source,
        _zero_scaling,
        _zero12_looks,
    ),
    Kind(
        ("BF16_Optimizer",),
        ("bf16_groups", "dp_process_group", "fp32_groups_gradients_flat"),
        gradients.whole_flat_groups,
        _no_scaling,
        lambda _: _checks_norm(),  # before, it stops with an assertion that says nothing
    ),
    Kind(
        ("FP16_Optimizer", "FP16_UnfusedOptimizer"),
        ("_update_scale", "fp16_groups", "overflow"),
        lambda optimizer, positions: gradients.ParameterGradients(optimizer.fp16_groups, positions),
        _fp16_scaling,
    ),
    Kind(
        ("Optimizer",),  # torch's own: stage 0 in float32
        ("param_groups",),
        lambda optimizer, positions: gradients.ParameterGradients(
            [group["params"] for group in optimizer.param_groups], positions
        ),
        _no_scaling,
        lambda _: False,
    ),
)

_NOT_YET = {
    "has_moe_layers": "mixture-of-experts layers",
    "swap_optimizer": "offload to NVMe",
    "zenflow": "ZenFlow",
}


def kind_for(engine: Any) -> Kind:
    """Returns what is known of the engine's optimizer.

    Raises:
        UnsupportedDeepSpeed: If nothing is, or what is known does not hold.
    """
    optimizer = engine.optimizer
    if optimizer is None or kind_of(optimizer, "DeepSpeedZeRoOffload"):
        raise UnsupportedDeepSpeed("this engine has no optimizer: there is no step to guard")
    found = next((kind for kind in KINDS if kind_of(optimizer, *kind.classes)), None)
    if found is None:
        raise UnsupportedDeepSpeed(
            f"the guard does not know {type(optimizer).__name__}; it works with ZeRO stages 0 to 3 "
            f"({', '.join(itertools.chain.from_iterable(kind.classes for kind in KINDS))})"
        )
    require(optimizer, "step", *found.needs)
    for name, what in _NOT_YET.items():
        if getattr(optimizer, name, False):
            raise UnsupportedDeepSpeed(f"the guard does not work with {what} yet")
    if kind_of(engine, "PipelineEngine"):
        raise UnsupportedDeepSpeed("the guard does not work with pipeline parallelism yet")
    if getattr(optimizer, "model_parallel_world_size", 1) > 1:
        raise UnsupportedDeepSpeed("the guard does not work with model parallelism yet")
    return found


def call_module(engine: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls the model as the engine's forward does, and not through it: that would change later weights (ZeRO 3)."""
    if engine.fp16_auto_cast():
        args = engine._cast_inputs_half(args)
    with _autocast(engine), _activations_kept():
        return engine.module(*args, **kwargs)


class _Kept:
    """Stands in for DeepSpeed's own checkpointing: its backward pass cannot be asked for gradients by name."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> None:
        outputs = function(*args)
        all_outputs += [outputs] if isinstance(outputs, torch.Tensor) else outputs


@contextlib.contextmanager
def _activations_kept() -> Iterator[None]:
    module: Any = sys.modules.get("deepspeed.runtime.activation_checkpointing.checkpointing")
    original = getattr(module, "CheckpointFunction", None)
    if original is None:
        yield
        return
    module.CheckpointFunction = _Kept
    try:
        yield
    finally:
        module.CheckpointFunction = original


def _autocast(engine: Any) -> Any:
    """What DeepSpeed runs the model under, where it has such a thing (>= 0.16.8)."""
    module = sys.modules.get("deepspeed.runtime.torch_autocast")
    enter = getattr(module, "autocast_if_enabled", None)
    return enter(engine) if enter is not None else contextlib.nullcontext()


def settings_of(engine: Any) -> Mapping[str, Any]:
    """Returns DeepSpeed's configuration as the user wrote it."""
    return getattr(engine._config, "_param_dict", {})


def told_not_to_look(engine: Any) -> bool:
    """Returns whether the user's configuration says in so many words that bf16 gradients must not be looked at."""
    config: Any = getattr(getattr(engine, "_config", None), "bfloat16_config", None)
    said: Any = getattr(config, "model_fields_set", set())
    return "check_grad_overflow" in said and not config.check_grad_overflow


def parameters_of(module: torch.nn.Module) -> list[NamedTensor]:
    """Returns the parameters in registration order; under ZeRO stage 3 as the slices that ranks hold of them."""
    return [_partitioned(item) for item in attribution.named_parameters(module)]


def _partitioned(item: NamedTensor) -> NamedTensor:
    parameter: Any = item.tensor
    if not hasattr(parameter, "ds_tensor"):
        return item

    def local_slice() -> tuple[torch.Tensor, int]:
        mine = slice_of(parameter)
        return parameter.ds_tensor.detach().view(-1)[: mine.real], mine.start

    return NamedTensor(item.kind, item.name, item.tensor, item.aliases, tuple(parameter.ds_shape), local_slice)


def known_bad(engine: Any, version: str) -> Iterable[str]:
    """Says what this release of DeepSpeed is known to get wrong for such an engine."""
    try:
        release = tuple(int(part) for part in version.split(".")[:3])
    except ValueError:
        return
    stage0_fp16 = kind_of(engine.optimizer, "FP16_Optimizer", "FP16_UnfusedOptimizer")
    if stage0_fp16 and (0, 18, 3) <= release <= (0, 19, 8) and _fp16_scaling(engine.optimizer).scale != 1.0:
        yield (
            f"DeepSpeed {version} at stage 0 in fp16 does not scale the loss in engine.backward, but divides the "
            "gradients by the scale: updates are far too small. Use ZeRO stage 1, or bf16."
        )
    gathers = getattr(engine, "gradient_accumulation_steps", lambda: 1)() > 1
    if kind_of(engine.optimizer, "DeepSpeedZeroOptimizer") and gathers and (0, 17, 6) <= release <= (0, 18, 2):
        yield f"DeepSpeed {version} drops micro-batches under ZeRO stage 2 with gradient accumulation: upgrade it."
