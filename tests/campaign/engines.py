"""The engines of the campaign's table, made by DeepSpeed; and the model whose sequence is cut over ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hallo_numguard.integrations.deepspeed.partition import slice_of

import deepspeed_support as support
from campaign.cases import MICRO_BATCHES, Case
from campaign.faults import build
from campaign.models import Attention, Transformer
from campaign.options import OPTIONS
from tensor_parallel import PARTS, autotp

AUTOTP = autotp(r".*mlp\.0\.weight$", r".*mlp\.2\.weight$")
DTYPES = {"fp16": torch.float16, "half": torch.float16, "bf16": torch.bfloat16, "bf16_fp32": torch.bfloat16}


class _OfHeads(nn.Module):
    """Attention over a whole sequence of the heads that a rank has: what DistributedAttention calls."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + mask.to(query.dtype)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2)


class SequenceAttention(Attention):
    """The campaign's attention, over a sequence of which each rank has a part: DeepSpeed's Ulysses."""

    def __init__(self, width: int, group: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__(width)
        self.distributed = DistributedAttention(_OfHeads(), group, scatter_idx=2, gather_idx=1)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1))
            for layer, source in ((self.query, x), (self.key, context), (self.value, context))
        )
        return self.output(self.distributed(query, key, value, 0, None, mask).flatten(2))


class SequenceTransformer(Transformer):
    """The campaign's transformer; the sequence is twice as long, and each of two ranks has half of it."""

    def __init__(self) -> None:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        super().__init__()
        for block in self.blocks:
            block.attention = SequenceAttention(16, parallel_state_sp.get_sequence_parallel_group())
        self.register_buffer("mask", torch.full((6 * PARTS, 6 * PARTS), float("-inf")).triu(1))


def make(case: Case, scale_power: int = 6, **config: Any) -> Any:
    """Returns the engine of a case; its model has the damage that it has before the run.

    Args:
        case: Case of the campaign.
        scale_power: Where a dynamic loss scale begins, as a power of 2.
        config: More of DeepSpeed's configuration.
    """
    from deepspeed.runtime import torch_autocast

    support.single_process_environment()
    support.allow_fp16()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # it is one for a process
    mpu = _sequence_groups() if case.way == "ulysses" else None
    # DeepSpeed converts parameters, not buffers: whoever trains in half precision does so himself.
    model = build(case, _class_of(case)).to(DTYPES.get(case.setup))
    groups_of = support.trained_by if case.model != "experts" else type(model).groups
    setup = "fp32" if case.is_autocast else case.setup
    engine = support.make_engine(
        setup, scale_power, case.stage, case.offload, model, groups_of, mpu=mpu, **{**_config(case), **config}
    )
    if case.is_autocast and case.is_half:
        scaler = engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**scale_power})
    if case.way == "compiled":
        engine.compile(backend="eager")
    return engine


def _class_of(case: Case) -> Any:
    """The model's class where it is not that of the campaign's table."""
    if case.way == "pipeline":
        from campaign.staged import StagedTransformer

        return StagedTransformer
    return SequenceTransformer if case.way == "ulysses" else None


def _config(case: Case) -> dict[str, Any]:
    if case.is_autocast:
        dtype = "float16" if case.is_half else "bfloat16"
        return {"torch_autocast": {"enabled": True, "dtype": dtype}}
    if case.way == "autotp":
        return {"tensor_parallel": AUTOTP}
    if case.way == "hpz":
        return {"zero_optimization": {"stage": 3, "reduce_bucket_size": 500, "zero_hpz_partition_size": PARTS}}
    if case.way == "pipeline":
        return {"gradient_accumulation_steps": MICRO_BATCHES, "steps_per_print": 1 << 20}
    if case.way in OPTIONS:
        config = dict(OPTIONS[case.way].config)
        if "zero_optimization" in config:
            sizes = {"reduce_bucket_size": 500, "allgather_bucket_size": 1000}
            config["zero_optimization"] = {"stage": case.stage, **sizes, **config["zero_optimization"]}
        return config
    return {}


def _sequence_groups() -> Any:
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.init_distributed("gloo", verbose=False)
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(PARTS)
    return parallel_state_sp


def batch_of(case: Case) -> int:
    """Returns which batch is this rank's: the ranks that share a tensor-parallel copy have the same."""
    rank = int(os.environ["RANK"])
    return rank // PARTS if case.way == "autotp" else rank


def _held(parameter: Any) -> torch.Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    return parameter.ds_tensor.view(-1)[: slice_of(parameter).real]


def is_finite(engine: Any) -> bool:
    """Returns whether what the ranks hold of the weights is, without padding, which is as memory was."""
    held = map(_held, engine.module.parameters())
    flag = torch.tensor(int(all(bool(torch.isfinite(tensor).all()) for tensor in held)), device=engine.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
