"""What the guard does not work with: the one list that `attach`, the documentation and the tests read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from hallo_numguard.core.errors import UnsupportedDeepSpeed
from hallo_numguard.integrations.deepspeed.parallel import is_pipeline, shards_of, spans_all_ranks
from hallo_numguard.integrations.deepspeed.version import is_instance_of, version


@dataclass(frozen=True)
class Unsupported:
    """A configuration that is refused when a guard is attached.

    Attributes:
        feature: What it is, as DeepSpeed's documentation calls it.
        shown_by: Class or attribute of the engine that shows it.
        reason: Why it is refused.
        remedy: What to do.
        is_on: Returns whether an engine is configured so.
    """

    feature: str
    shown_by: str
    reason: str
    remedy: str
    is_on: Callable[[Any], bool]


def _optimizer_is_on(attribute: str) -> Callable[[Any], bool]:
    return lambda engine: bool(getattr(engine.optimizer, attribute, False))


def _inner_optimizer_is(*names: str) -> Callable[[Any], bool]:
    def is_on(engine: Any) -> bool:
        inner = getattr(engine, "basic_optimizer", None)
        candidates = (engine.optimizer, inner, getattr(engine.optimizer, "optimizer", None))
        return any(is_instance_of(candidate, *names) for candidate in candidates)

    return is_on


def _has_no_optimizer(engine: Any) -> bool:
    return engine.optimizer is None or is_instance_of(engine.optimizer, "DeepSpeedZeRoOffload", "DummyOptim")


def _steps_in_backward(engine: Any) -> bool:
    return is_instance_of(engine.optimizer, "SuperOffloadOptimizer_Stage3")


def _has_zenflow(engine: Any) -> bool:
    return bool(getattr(engine, "zenflow", False) or getattr(engine.optimizer, "zenflow", False))


def _has_experts(engine: Any) -> bool:
    return bool(getattr(engine, "has_moe_layers", False) or getattr(engine.optimizer, "has_moe_layers", False))


def _quantizes_gradients(engine: Any) -> bool:
    """As DeepSpeedZeroOptimizer_Stage3.__avg_scatter_grads: on one node nothing is quantized."""
    if getattr(engine.optimizer, "all2all_process_group", None) is None:
        return False
    from deepspeed.accelerator import get_accelerator

    return dist.get_world_size() // int(get_accelerator().device_count()) > 1


UNSUPPORTED = (
    Unsupported(
        "an engine without optimizer",
        "engine.optimizer",
        "there is no step to guard",
        "Attach to the engine that trains.",
        _has_no_optimizer,
    ),
    Unsupported(
        "tensor parallelism inside of a pipeline",
        "engine.grid.slice_parallel_size",
        "a stage's layers are cut, and their parts send and receive parts of activations",
        "Train with pipeline and data parallelism alone, or without the guard.",
        lambda engine: is_pipeline(engine) and shards_of(engine) > 1,
    ),
    Unsupported(
        "experts inside of a pipeline",
        "engine.has_moe_layers",
        "its ranks share experts otherwise than the rest of a stage",
        "Train with experts and ZeRO alone, or without the guard.",
        lambda engine: is_pipeline(engine) and _has_experts(engine),
    ),
    Unsupported(
        "experts beside tensor parallelism",
        "engine.has_moe_layers",
        "its ranks share experts otherwise than the rest of the model",
        "Train with experts and ZeRO alone, or without the guard.",
        lambda engine: _has_experts(engine) and shards_of(engine) > 1,
    ),
    Unsupported(
        "AutoEP",
        "AutoEPMoELayer",
        "its experts lie in one tensor that is cut over ranks",
        "Train with deepspeed.moe.layer.MoE, or without the guard.",
        lambda engine: any(is_instance_of(module, "AutoEPMoELayer") for module in engine.module.modules()),
    ),
    Unsupported(
        "tensor parallelism on a part of the ranks",
        "engine.mpu",
        "its data-parallel and model-parallel groups together are not all ranks of the job",
        "Give every rank of the job a part of this model.",
        lambda engine: not spans_all_ranks(engine),
    ),
    Unsupported(
        "ZenFlow",
        "engine.zenflow",
        "it updates important gradients apart from the others",
        "Use ZeRO offload without it.",
        _has_zenflow,
    ),
    Unsupported(
        "SuperOffload",
        "SuperOffloadOptimizer_Stage3",
        "it updates sub-groups during the backward pass, before all gradients are there",
        'Use "offload_optimizer" without "super_offload".',
        _steps_in_backward,
    ),
    Unsupported(
        "DeepCompile",
        "engine.is_deepcompile_enabled",
        "it takes off the hooks by which a batch is run again, and reduces gradients inside of compiled code",
        'Call engine.compile() without "deepcompile": true in the configuration.',
        lambda engine: bool(getattr(engine, "is_deepcompile_enabled", bool)()),
    ),
    Unsupported(
        "1-bit optimizers",
        "OnebitAdam, ZeroOneAdam, OnebitLamb",
        "they reduce gradients inside of their step, compressed",
        "Use Adam or Lamb.",
        _inner_optimizer_is("OnebitAdam", "ZeroOneAdam", "OnebitLamb"),
    ),
    Unsupported(
        "quantized gradients (ZeRO++ qgZ) over several nodes",
        "engine.optimizer.all2all_process_group",
        "among 4-bit numbers a NaN is 0: bad gradients arrive finite, and no check after the reduction sees them",
        'Leave "zero_quantized_gradients" out; "zero_quantized_weights" and "zero_hpz_partition_size" may stay.',
        _quantizes_gradients,
    ),
    Unsupported(
        "MiCS",
        "MiCS_Optimizer",
        "shards are reduced over groups of their own",
        "Use ZeRO stage 3, with zero_hpz_partition_size.",
        lambda engine: is_instance_of(engine.optimizer, "MiCS_Optimizer"),
    ),
)


def check_supported(engine: Any) -> None:
    """Raises UnsupportedDeepSpeed if the guard does not work with such an engine, with what to do."""
    for item in UNSUPPORTED:
        if item.is_on(engine):
            raise UnsupportedDeepSpeed(
                f"the guard does not work with {item.feature}: {item.reason} (DeepSpeed {version()}, "
                f"{type(engine).__name__} with {type(engine.optimizer).__name__}, seen by {item.shown_by}). "
                f"{item.remedy}"
            )


def refused_table() -> list[str]:
    """Returns the list as lines of a Markdown table."""
    rows = [f"| {item.feature} | `{item.shown_by}` | {item.reason} | {item.remedy} |" for item in UNSUPPORTED]
    return ["| refused | seen by | because | instead |", "|---|---|---|---|", *rows]
