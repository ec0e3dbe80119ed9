"""Tensors in nested values: tuples, dicts, dataclasses, namespaces, and any other object with attributes."""

from __future__ import annotations

import enum
import random
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch

from hallo_numguard.ops.formats import FORMATS

MAX_DEPTH = 32
MAX_VALUES = 10_000  # that are visited in one walk

# Values without tensors inside.
_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    range,
    slice,
    type,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.nn.Module,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
)


class Contents(NamedTuple):
    """Contents of a nested value.

    Attributes:
        tensors: Every tensor with its path as the name, as `batch['pixels'][0]`.
        opaque: Paths of the values that cannot be looked through, such as iterators.
        generators: Random number generators.
        containers: Lists and dicts that can change, the attributes of objects among them.
    """

    tensors: list[tuple[str, torch.Tensor]]
    opaque: list[str]
    generators: list[Any]
    containers: list[list[Any] | dict[Any, Any]]


def contents_of(name: str, value: Any) -> Contents:
    """Looks through a nested value. What is nested too deep, or is too large, is opaque where it goes on."""
    return contents_of_items([(name, value)])


def contents_of_items(items: Iterable[tuple[str, Any]]) -> Contents:
    """Looks through several nested values, each with its name."""
    walk = _Walk()
    for name, value in items:
        walk.visit(name, value, 0)
    return walk.found


def tensors_in(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """Returns every tensor in `value` with its path as the name."""
    return contents_of(name, value).tensors


def floating_tensors_in(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """Returns the tensors that the kernels can read: dense, of a floating-point dtype, with memory of their own."""
    return [(path, tensor) for path, tensor in tensors_in(name, value) if is_readable(tensor)]


class _Walk:
    def __init__(self) -> None:
        self.found = Contents([], [], [], [])
        self._room = MAX_VALUES
        self._seen: dict[int, Any] = {}  # containers by id, which stay alive meanwhile

    def visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self.found.tensors.append((name, value))
        elif is_generator(value):
            self.found.generators.append(value)
        elif not isinstance(value, _LEAVES) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._room -= 1
            self._visit_items(name, value, depth + 1)

    def _visit_items(self, name: str, value: Any, depth: int) -> None:
        items = _items(name, value)
        if items is None or depth > MAX_DEPTH or self._room < 0:
            self.found.opaque.append(name)
            return
        if isinstance(value, (list, dict)):
            self.found.containers.append(value)
        elif hasattr(value, "__dict__"):
            self.found.containers.append(vars(value))
        for path, item in items:
            self.visit(path, item, depth)


def _items(name: str, value: Any) -> list[tuple[str, Any]] | None:
    """The values directly inside of another, with their paths; None if it cannot be looked through."""
    if isinstance(value, (list, tuple)):
        return [(f"{name}[{position}]", item) for position, item in enumerate(value)]
    if isinstance(value, Mapping):
        return [(f"{name}[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return [(f"{name}{{{position}}}", item) for position, item in enumerate(value)]
    if is_dataclass(value):
        return [(f"{name}.{item.name}", getattr(value, item.name, None)) for item in fields(value)]
    if type(value).__module__ == "numpy":
        return []
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return None
    return [(f"{name}.{key}", item) for key, item in list(attributes.items())]


def batch_size_of(tensors: Iterable[torch.Tensor]) -> int | None:
    """Returns the size of the first dimension that most of the tensors have; None without any."""
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    return sizes.most_common(1)[0][0] if sizes else None


def is_generator(value: Any) -> bool:
    """Returns whether it is a random number generator: of torch, of numpy, or `random.Random`."""
    return isinstance(value, (torch.Generator, random.Random)) or (
        type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")
    )


def is_readable(tensor: torch.Tensor) -> bool:
    """Returns whether the kernels can read a tensor: dense, floating-point, and its elements are in its own memory."""
    return tensor.dtype in FORMATS and tensor.layout is torch.strided and not tensor.is_meta and _has_own_memory(tensor)


def _has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether it is no wrapper of other tensors, which computes by `__torch_dispatch__`."""
    kind = type(tensor)
    return kind in _PLAIN or getattr(kind, "__torch_dispatch__", None) is torch.Tensor.__torch_dispatch__


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a readable tensor, detached and without the methods of a subclass, on the same memory."""
    if type(tensor) in _PLAIN:
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def whole_bytes(parameter: torch.Tensor) -> int:
    """Returns the size of a whole parameter in bytes, even while it is elsewhere (ZeRO stage 3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


_PLAIN = (torch.Tensor, torch.nn.Parameter)
