"""Whether a value that came from a file is what its dataclass declares."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


def is_as_declared(value: Any, hint: Any) -> bool:
    """Returns whether `value` is what the annotation `hint` says, with all that is inside of it.

    A float may be an int. Of a mapping only that it is one is looked at.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        return isinstance(value, hint) and all(
            is_as_declared(getattr(value, name), inner) for name, inner in _hints(hint)
        )
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(is_as_declared(value, choice) for choice in get_args(hint))
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(is_as_declared(item, get_args(hint)[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (float, int)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


@functools.cache
def _hints(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls)
    return [(field.name, hints[field.name]) for field in fields(cls)]
