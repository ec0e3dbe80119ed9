"""Tensors in nested values: tuples, dicts, dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from hallo_numguard.ops.formats import FORMATS


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor in `value` with its path as the name, as `batch['pixels'][0]`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from tensors_in(f"{name}[{position}]", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(f"{name}[{key!r}]", item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(f"{name}.{item.name}", getattr(value, item.name))


def floating_tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that the kernels can read: plain, dense, of a floating-point dtype."""
    for inner, tensor in tensors_in(name, value):
        if is_readable(tensor):
            yield inner, tensor


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor."""
    return type(tensor) in _PLAIN and tensor.dtype in FORMATS and tensor.layout is torch.strided and not tensor.is_meta


def whole_bytes(parameter: torch.Tensor) -> int:
    """Returns the size of a whole parameter in bytes, even while it is elsewhere (ZeRO stage 3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


_PLAIN = (torch.Tensor, torch.nn.Parameter)
