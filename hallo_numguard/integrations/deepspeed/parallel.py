"""Tensor parallelism: which ranks train a model together, and which part of a tensor each of them holds.

With it, `dp_process_group` joins only the ranks that hold the same part. The guard decides over all ranks instead: the
model's own collectives, in every pass that the guard repeats, need the ranks of the other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from hallo_numguard.guard.collectives import Place, Ranks
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import PADDING
from hallo_numguard.guard.tensor_parts import Shard, block
from hallo_numguard.integrations.deepspeed.experts import Experts, expert_copy_of
from hallo_numguard.integrations.deepspeed.version import is_instance_of, require

_AUTOTP_METADATA = "ds_autotp_universal_checkpoint_meta"  # deepspeed/checkpoint/constants.py


def is_pipeline(engine: Any) -> bool:
    """Returns whether an engine is one of a pipeline."""
    return is_instance_of(engine, "PipelineEngine")


def shards_of(engine: Any) -> int:
    """Returns the number of parts into which the model's tensors are cut; 1 without tensor parallelism."""
    mpu = getattr(engine, "mpu", None)
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):  # the latter cuts sequences, and no weights
        return 1
    if is_pipeline(engine):  # its mpu counts stages as well
        return int(engine.grid.get_slice_parallel_world_size())
    return int(mpu.get_model_parallel_world_size())


def ranks_of(engine: Any) -> Ranks:
    """Returns the ranks that share a copy of the model, and those of all other copies: the guard's only group."""
    if is_pipeline(engine):  # which spans all ranks of the job
        require(engine, "_INSTRUCTION_MAP", "grid", "pipe_buffers")
        require(engine.module, "_local_start", "forward_funcs", "loss_fn", "world_group")
        grid = engine.grid
        numbers = grid.get_data_parallel_rank(), grid.get_pipe_parallel_rank(), grid.get_data_parallel_world_size()
        return Ranks(engine.module.world_group, place=Place(*map(int, numbers)))
    if shards_of(engine) > 1:
        mpu = engine.mpu
        numbers = mpu.get_data_parallel_rank(), mpu.get_model_parallel_rank(), mpu.get_data_parallel_world_size()
        return Ranks(place=Place(*map(int, numbers)))
    of_optimizer = getattr(engine.optimizer, "dp_process_group", None)  # stage 0 has none of its own
    names = ("seq_data_parallel_group", "data_parallel_group")  # equal where no sequence is cut into parts
    return Ranks(of_optimizer or next(filter(None, (getattr(engine, name, None) for name in names)), None))


def clips_over(engine: Any, ranks: Ranks) -> bool:
    """Returns whether `engine.clip_fp32_gradients` reduces once, and over these ranks."""
    group = getattr(engine, "data_parallel_group", None)
    return getattr(engine, "mpu", None) is None and ranks.are(group)


def spans_all_ranks(engine: Any) -> bool:
    """Returns whether all ranks of the job train this model, if it is cut into parts."""
    shards = shards_of(engine)
    return shards == 1 or shards * int(engine.mpu.get_data_parallel_world_size()) == dist.get_world_size()


def with_shards(engine: Any, parameters: Sequence[NamedTensor]) -> list[NamedTensor]:
    """Returns the parameters with the place of this rank's part in the whole tensor, where one is cut."""
    shards = shards_of(engine)
    return [_located(item, engine, shards) if shards > 1 and _is_cut(item.tensor) else item for item in parameters]


def _is_cut(parameter: torch.Tensor) -> bool:
    """As deepspeed/runtime/utils.py, `is_model_parallel_parameter`."""
    return bool(getattr(parameter, "model_parallel", False) or getattr(parameter, "tensor_model_parallel", False))


def _located(item: NamedTensor, engine: Any, shards: int) -> NamedTensor:
    """The parameter with its whole shape; with that of its part where how it was cut is not known."""
    parameter: Any = item.tensor
    rank, shape = int(engine.mpu.get_model_parallel_rank()), list(item.whole_shape)
    metadata: Mapping[str, Any] = getattr(parameter, _AUTOTP_METADATA, {})
    dimension = metadata.get("partition_dim", getattr(parameter, "partition_dim", None))
    sizes = metadata.get("partition_sizes")
    if not metadata and isinstance(dimension, int) and getattr(parameter, "partition_stride", 1) == 1:
        sizes = [shape[dimension]] * shards if 0 <= dimension < len(shape) else None  # as Megatron cuts
    if dimension is None or not sizes or sizes[rank] != shape[dimension]:
        return replace(item, shard=Shard())
    begin, size = sum(sizes[:rank]), shape[dimension]
    shape[dimension] = sum(sizes)
    return replace(item, shape=tuple(shape), shard=block(shape, dimension, begin, size))


class PartFigures:
    """This rank's share of the figures of a step: together, the ranks count each element of the model once.

    Args:
        parameters: The guard's list; it may grow.
        counts_here: Returns whether this rank is the one to count a tensor, or its part of one.
    """

    def __init__(self, parameters: Sequence[NamedTensor], counts_here: Callable[[NamedTensor], bool]) -> None:
        self._parameters = parameters
        self._counts_here = counts_here
        self._pieces: Sequence[Any] = ()
        self._counted: torch.Tensor | None = None

    def __call__(self, scan: ScannedPieces) -> torch.Tensor:
        """Returns the figures as in `figure_exchange.PART`. No host sync."""
        table = scan.table
        if self._counted is None or (self._pieces is not scan.pieces and self._pieces != scan.pieces):
            counted = [self._counts(piece.parameter) for piece in scan.pieces]
            self._counted = torch.tensor(counted, dtype=torch.float64, device=table.packed.device)
            self._pieces = scan.pieces
        counts = self._counted @ table.nonfinite_counts.double()
        absmax = table.absmax.amax() if len(table) else counts.new_zeros(())
        return torch.stack([counts[0], counts[1] + counts[2], absmax, self._counted @ table.sumsq])

    def _counts(self, position: int) -> bool:
        return position != PADDING.parameter and self._counts_here(self._parameters[position])


def figures_of(
    engine: Any, parameters: Sequence[NamedTensor], ranks: Ranks, experts: Experts, is_sliced: bool
) -> PartFigures | None:
    """Returns how this rank's share of the figures is made; None where all that it holds is its share.

    Args:
        engine: The engine.
        parameters: The guard's list.
        ranks: Ranks that take part.
        experts: Experts of the model.
        is_sliced: Whether ranks hold slices of the gradients; else copies.
    """
    place = ranks.place
    if place is not None:
        is_first = is_sliced or place.copy == 0
        return PartFigures(parameters, lambda item: is_first and (place.shard == 0 or item.shard is not None))
    if experts.are_parted and not is_sliced:
        is_first_expert = expert_copy_of(engine) == 0
        return PartFigures(parameters, lambda item: ranks.position == 0 if item.is_everywhere else is_first_expert)
    return None
