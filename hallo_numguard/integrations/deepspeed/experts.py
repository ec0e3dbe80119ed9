"""Mixture of experts: the experts that other ranks hold, and names that mean the same on all ranks.

Every rank numbers the experts that it holds from 0 on. The guard's list has all of them under their global numbers, in
the same order on every rank; those that this rank does not hold are empty there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hallo_numguard.guard.guarded_model import Routed, Router
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.integrations.deepspeed.version import is_instance_of

_NUMBERED = re.compile(r"(?P<layer>[\w.]*\bdeepspeed_experts)\.(?P<number>\d+)")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        held: Number of experts that each rank of an expert-parallel group holds.
        part: Number of this rank's part.
        parts: Number of parts, the size of that group.
    """

    held: int
    part: int
    parts: int

    def number(self, local: int, part: int | None = None) -> int:
        """Returns the global number of an expert, by its number on this rank, or in another part."""
        return local + self.held * (self.part if part is None else part)


class Experts:
    """The layers of an engine's model that have experts.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Any) -> None:
        self._layers: Mapping[str, ExpertLayer] = {
            f"{name}.deepspeed_experts".lstrip("."): _layer(module)
            for name, module in engine.module.named_modules()
            if is_instance_of(module, "Experts") and hasattr(module, "deepspeed_experts")
        }

    @property
    def are_parted(self) -> bool:
        """Whether ranks hold different experts."""
        return any(layer.parts > 1 for layer in self._layers.values())

    def listed(self, tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
        """Returns the tensors with those of all experts, in an order that is the same on all ranks."""
        return [item for tensor in tensors for item in self._in_all_parts(tensor)]

    def in_global_names(self, text: str) -> str:
        """Returns a text with the global numbers of this rank's experts."""
        return _NUMBERED.sub(self._numbered, text) if self.are_parted else text

    def _numbered(self, found: re.Match[str]) -> str:
        layer = self._layers.get(found["layer"])
        number = int(found["number"])
        return f"{found['layer']}.{number if layer is None else layer.number(number)}"

    def _layer_of(self, name: str) -> tuple[str, int] | None:
        found = _NUMBERED.match(name)
        return (found["layer"], int(found["number"])) if found and found["layer"] in self._layers else None

    def _in_all_parts(self, item: NamedTensor) -> Sequence[NamedTensor]:
        found = self._layer_of(item.name)
        if found is None or self._layers[found[0]].parts == 1:
            return [item]
        (path, local), layer = found, self._layers[found[0]]
        return [
            replace(
                item,
                name=item.name.replace(f"{path}.{local}", f"{path}.{layer.number(local, part)}", 1),
                tensor=item.tensor if part == layer.part else torch.empty(0, dtype=item.tensor.dtype),
                shape=item.whole_shape,
                is_everywhere=False,
            )
            for part in range(layer.parts)
        ]


def _layer(module: Any) -> ExpertLayer:
    from deepspeed.utils import groups

    parameter: Any = next(module.deepspeed_experts.parameters())
    name = parameter.group_name
    return ExpertLayer(
        int(module.num_local_experts),
        int(groups._get_expert_parallel_rank(name)),
        int(groups._get_expert_parallel_world_size(name)),
    )


def routers_of(engine: Any) -> list[Router]:
    """Returns the gates of an engine's mixtures of experts."""
    return [
        Router(name, module, partial(_routed, module))
        for name, module in engine.module.named_modules()
        if is_instance_of(module, "TopKGate")
    ]


def _routed(gate: Any, args: Any, output: Any) -> Routed:
    """What a gate has decided. It returns no logits: they are made once more, without the noise of its policy."""
    logits = torch.nn.functional.linear(args[0].float(), gate.wg.weight.float())
    # (balance, weights [tokens, experts, capacity], mask, chosen), or with sparse routes (balance, capacity, ...)
    capacity = output[1].shape[-1] if len(output) == 4 else output[1]
    return Routed(logits, output[-1], capacity)


def expert_copy_of(engine: Any) -> int:
    """Returns the number of this rank's copy of its experts: 0 where no lower rank holds the same."""
    from deepspeed.utils import groups

    names = getattr(engine, "expert_data_parallel_group", None) or {}
    return max((int(groups._get_expert_data_parallel_rank(name)) for name in names), default=0)
