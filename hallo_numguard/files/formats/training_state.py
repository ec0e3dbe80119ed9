"""Optimizers, schedulers and loss scalers in a file of torch.save: settings, and which tensors are their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hallo_numguard.files.formats.pickles import StoredTensor, plain
from hallo_numguard.files.formats.source import state_role

_MAX_DEPTH = 6  # of containers around an optimizer
_MAX_FOUND = 64
_SCHEDULER_KEYS = ("last_epoch", "_step_count")


def state_roles(value: Any) -> Callable[[str], str | None]:
    """Returns a function of a tensor's name: its role in an optimizer's state, or None elsewhere."""
    prefixes = tuple(f"{path}." if path else "" for path, _ in _optimizers(value))

    def role(name: str) -> str | None:
        for prefix in prefixes:
            if name.startswith(f"{prefix}state."):
                return state_role(name.rpartition(".")[2])
        return None

    return role


def training_state(value: Any) -> dict[str, Any]:
    """Returns the metadata "optimizers", "schedulers" and "scalers": lists, left out if they are empty."""
    found = {
        "optimizers": [_optimizer(path, item) for path, item in _optimizers(value)],
        "schedulers": [
            {"path": path, **_numbers(item)}
            for path, item in _mappings(value)
            if any(key in item for key in _SCHEDULER_KEYS)
        ],
        "scalers": [
            {"path": path, **_numbers(item)}
            for path, item in _mappings(value)
            if {"scale", "growth_factor"} <= set(item)
        ],
    }
    return {key: items for key, items in found.items() if items}


def _optimizers(value: Any) -> list[tuple[str, Mapping[Any, Any]]]:
    return [
        (path, item)
        for path, item in _mappings(value)
        if isinstance(item.get("state"), Mapping) and isinstance(item.get("param_groups"), (list, tuple))
    ]


def _optimizer(path: str, item: Mapping[Any, Any]) -> dict[str, Any]:
    """Groups with the keys of their parameters, and the parameters with state: its tensors' shapes, and its numbers."""
    groups = [group for group in item["param_groups"] if isinstance(group, Mapping)]
    states = {key: state for key, state in item["state"].items() if isinstance(state, Mapping)}
    return {
        "path": path,
        "groups": [{**_numbers(group), "params": _keys(group.get("params"))} for group in groups],
        "states": {
            str(key): {
                str(name): part.shape if isinstance(part, StoredTensor) else plain(part) for name, part in state.items()
            }
            for key, state in states.items()
        },
    }


def _keys(params: Any) -> list[Any]:
    """The keys of a group's parameters."""
    keys = plain(params)
    return keys if isinstance(keys, list) else []


def _numbers(item: Mapping[Any, Any]) -> dict[str, Any]:
    """The numbers, texts and short lists in a mapping."""
    return {
        key: plain(part)
        for key, part in item.items()
        if isinstance(key, str) and key != "params" and isinstance(part, (bool, int, float, str, list, tuple))
    }


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings near the top of nested containers, with the keys that lead to them."""
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    seen: set[int] = set()
    count = 0
    while stack and count < _MAX_FOUND * _MAX_FOUND:
        path, item, depth = stack.pop()
        if id(item) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(item))
        count += 1
        if isinstance(item, Mapping):
            yield path, item
            if not (isinstance(item.get("state"), Mapping) and "param_groups" in item):
                stack.extend((f"{path}.{key}" if path else str(key), part, depth + 1) for key, part in item.items())
        elif isinstance(item, (list, tuple)) and len(item) <= _MAX_FOUND:
            stack.extend(
                (f"{path}.{number}" if path else str(number), part, depth + 1) for number, part in enumerate(item)
            )
