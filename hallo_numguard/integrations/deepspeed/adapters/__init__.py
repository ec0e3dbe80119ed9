"""Adapters: one file per class of DeepSpeed's optimizers, with everything specific to that class."""

from __future__ import annotations

import itertools
from typing import Any

from hallo_numguard.core.errors import UnsupportedDeepSpeed
from hallo_numguard.integrations.deepspeed.adapters.bf16 import Bf16Adapter
from hallo_numguard.integrations.deepspeed.adapters.fp16 import Fp16FusedAdapter, Fp16UnfusedAdapter
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import Positions
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import OptimizerAdapter
from hallo_numguard.integrations.deepspeed.adapters.plain import PlainAdapter
from hallo_numguard.integrations.deepspeed.adapters.zero3 import Zero3Adapter
from hallo_numguard.integrations.deepspeed.adapters.zero12 import Zero12Adapter

# The first match is taken: a class comes before its bases.
ADAPTERS: tuple[type[OptimizerAdapter], ...] = (
    Zero3Adapter,
    Zero12Adapter,
    Bf16Adapter,
    Fp16FusedAdapter,
    Fp16UnfusedAdapter,
    PlainAdapter,
)


def adapter_class(optimizer: Any) -> type[OptimizerAdapter]:
    """Returns the class of adapters of an engine's optimizer.

    Args:
        optimizer: `engine.optimizer`.

    Raises:
        UnsupportedDeepSpeed: If the class is unknown, or configured in a way that the guard does not work with.
    """
    found = next((adapter for adapter in ADAPTERS if adapter.is_for(optimizer)), None)
    if found is None:
        names = ", ".join(itertools.chain.from_iterable(adapter.class_names for adapter in ADAPTERS))
        raise UnsupportedDeepSpeed(
            f"the guard does not know {type(optimizer).__name__}; it works with ZeRO stages 0 to 3 ({names})"
        )
    found.check_supported(optimizer)
    return found


def adapter_for(optimizer: Any, positions: Positions) -> OptimizerAdapter:
    """Returns the adapter of an engine's optimizer.

    Args:
        optimizer: `engine.optimizer`.
        positions: Position in the guard's list, by parameter.

    Raises:
        UnsupportedDeepSpeed: As `adapter_class`.
    """
    return adapter_class(optimizer)(optimizer, positions)
