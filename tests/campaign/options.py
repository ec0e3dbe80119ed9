"""Options of DeepSpeed's configuration, and ways to write a training loop, each with engines to try it in. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

_MICRO_BATCHES = 3


class Option(NamedTuple):
    """One of them.

    Attributes:
        words: What it is, for the table.
        engines: Setup and stage of ZeRO of each engine.
        config: The configuration, besides that of the engine.
        loop: Key of `loops.LOOPS`.
        micro_batches: Of a step.
        offload: Whether the optimizer's state lies on the CPU.
        model: Key of the campaign's models.
    """

    words: str
    engines: Sequence[tuple[str, int]]
    config: Mapping[str, Any] = MappingProxyType({})
    loop: str = "plain"
    micro_batches: int = 1
    offload: bool = False
    model: str = "transformer"


_STAGES_1_2 = (("fp16", 1), ("bf16", 2))
_STAGE_3 = (("fp16", 3), ("bf16", 3))
_ZERO = (("fp16", 1), ("bf16", 2), ("fp16", 3))
_ALL = (("fp32", 0), ("bf16_fp32", 1), *_ZERO)


def _zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


def _accumulated(words: str, engines: Sequence[tuple[str, int]], loop: str, **config: Any) -> Option:
    return Option(words, engines, config, loop, _MICRO_BATCHES)


OPTIONS = {
    "noncontiguous": Option("`contiguous_gradients: false`", _ZERO, _zero(contiguous_gradients=False)),
    "all-reduce": Option("`reduce_scatter: false`", _STAGES_1_2, _zero(reduce_scatter=False)),
    "rank-buckets": Option(
        "`use_multi_rank_bucket_allreduce: false`", _STAGES_1_2, _zero(use_multi_rank_bucket_allreduce=False)
    ),
    "no-allgather": Option("`allgather_partitions: false`", _STAGES_1_2, _zero(allgather_partitions=False)),
    "overlap": Option("`overlap_comm: true`", (("bf16_fp32", 1), *_ZERO), _zero(overlap_comm=True)),
    "no-overlap": Option("`overlap_comm: false`", _ZERO, _zero(overlap_comm=False)),
    "round-robin": Option("`round_robin_gradients: true`", _STAGES_1_2, _zero(round_robin_gradients=True)),
    "alignment": Option("`parameter_alignment: true`", _STAGES_1_2, _zero(parameter_alignment=True)),
    "unused": Option("`ignore_unused_parameters: false`", _STAGES_1_2, _zero(ignore_unused_parameters=False)),
    "elastic": Option("`elastic_checkpoint: true`", _STAGES_1_2, _zero(elastic_checkpoint=True)),
    "no-norm": Option(
        "`compute_grad_norm: false`", _STAGES_1_2, {**_zero(compute_grad_norm=False), "gradient_clipping": 0.0}
    ),
    "sub-groups": Option("`sub_group_size: 200`", _STAGE_3, _zero(sub_group_size=200)),
    "sub-groups-offload": Option("`sub_group_size: 200`, offload", _STAGE_3, _zero(sub_group_size=200), offload=True),
    "fetch": Option(
        "`stage3_use_all_reduce_for_fetch_params: true`", _STAGE_3, _zero(stage3_use_all_reduce_for_fetch_params=True)
    ),
    "sequential": Option("`stage3_allgather_sequential: true`", _STAGE_3, _zero(stage3_allgather_sequential=True)),
    "linear": Option("`memory_efficient_linear: false`", _STAGE_3, _zero(memory_efficient_linear=False)),
    "sanity": Option("`enable_sanity_checks: true`", _STAGE_3, _zero(enable_sanity_checks=True)),
    "live": Option(
        "`stage3_max_live_parameters: 1`, no prefetch, no reuse",
        _STAGE_3,
        _zero(stage3_max_live_parameters=1, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0),
    ),
    "persistent": Option(
        "`stage3_param_persistence_threshold` above all", _STAGE_3, _zero(stage3_param_persistence_threshold=1 << 20)
    ),
    "partitioned": Option(
        "`stage3_param_persistence_threshold: 0`", _STAGE_3, _zero(stage3_param_persistence_threshold=0)
    ),
    "offload-param": Option(
        "`offload_param` to the CPU", _STAGE_3, _zero(offload_param={"device": "cpu"}), offload=True
    ),
    "leaf": Option(
        "leaf modules (`leaf_module`)",
        (("fp32", 3), *_STAGE_3),
        _zero(leaf_module={"classes": ["campaign.models.PlainMixture"]}),
        model="sparse",
    ),
    "communication": Option('`communication_data_type: "fp32"`', _ALL, {"communication_data_type": "fp32"}),
    "communication-bf16": Option(
        '`communication_data_type: "bf16"`', (("fp32", 2), ("fp32", 3)), {"communication_data_type": "bf16"}
    ),
    "prescale": Option(
        "`prescale_gradients: true`, `gradient_predivide_factor: 2.0`",
        (("fp32", 0), ("fp16", 0), ("fp16", 1)),
        {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    ),
    "sum": Option(
        '`gradient_allreduce_op: "sum"`',
        (("fp32", 0), ("bf16_fp32", 1), ("fp16", 1), ("bf16", 2)),
        {"gradient_allreduce_op": "sum"},
    ),
    "timers": Option(
        "`wall_clock_breakdown`, `memory_breakdown`", _ALL, {"wall_clock_breakdown": True, "memory_breakdown": True}
    ),
    "flops": Option("`flops_profiler`", _ALL, {"flops_profiler": {"enabled": True, "profile_step": 2}}),
    "comms": Option("`comms_logger`", _ZERO, {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}}),
    "immediate": Option(
        "`immediate_grad_update: true`", (("bf16_fp32", 1),), {"bf16": {"enabled": True, "immediate_grad_update": True}}
    ),
    "accumulate-bf16": Option(
        '`grad_accum_dtype: "bf16"`',
        (("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)),
        {"data_types": {"grad_accum_dtype": "bf16"}},
    ),
    "accumulate-fp32": Option(
        '`grad_accum_dtype: "fp32"`',
        (("fp16", 1), ("fp16", 2), *_STAGE_3),
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "warm-up": Option(
        "scheduler `WarmupLR`",
        _ALL,
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.001}}},
    ),
    "accumulation": _accumulated(
        "`gradient_accumulation_steps: 3`", _ALL, "plain", gradient_accumulation_steps=_MICRO_BATCHES
    ),
    "boundary": _accumulated("`set_gradient_accumulation_boundary`", _ALL, "boundary"),
    "no-sync": _accumulated("`no_sync`", (("fp32", 0), ("bf16_fp32", 1), ("fp16", 1)), "no_sync"),
    "coalesce": _accumulated("`coalesce_grad_reduction`", _ZERO, "coalesce"),
    "unmanaged": _accumulated(
        "`managed_gradient_accumulation: false`", _ALL, "step_at_end", managed_gradient_accumulation=False
    ),
    "tensor-backward": Option("`engine.scale(loss).backward()`", _ZERO, loop="tensor_backward"),
    "evaluation": Option("`engine.eval()` and a batch without gradients, in between", _ALL, loop="evaluation"),
    "gathered": Option("`GatheredParameters` over all weights, in between", _STAGE_3, loop="gathered"),
    "get-and-set": Option("`safe_get_full_grad`, `safe_set_full_fp32_param`", _ZERO, loop="get_and_set"),
}
FAULTS_TRIED = ("none", "weight", "forward", "gradient")
