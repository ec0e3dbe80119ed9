"""The installed DeepSpeed release, and errors about unknown ones."""

from __future__ import annotations

import sys
from typing import Any

from hallo_numguard.core.errors import UnsupportedDeepSpeed


def version() -> str:
    """Returns the version of the DeepSpeed that is loaded."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version"))


def is_instance_of(value: Any, *names: str) -> bool:
    """Returns whether `value` is an instance of a class with one of these names."""
    return any(base.__name__ in names for base in type(value).__mro__)


def require(optimizer: Any, *attributes: str) -> None:
    """Raises UnsupportedDeepSpeed unless `optimizer` has all these attributes."""
    for name in attributes:
        if not hasattr(optimizer, name):
            raise UnsupportedDeepSpeed(f"DeepSpeed {version()}: {type(optimizer).__name__} has no attribute {name}")


def unknown_layout(optimizer: Any, attribute: str, what: str) -> UnsupportedDeepSpeed:
    """Returns the error for an attribute that does not hold what it should."""
    return UnsupportedDeepSpeed(
        f"DeepSpeed {version()}: {type(optimizer).__name__}.{attribute} holds {what}: an unknown layout"
    )


def release() -> tuple[int, ...]:
    """Returns the first three numbers of the version; () if it has none."""
    try:
        return tuple(int(part) for part in version().split(".")[:3])
    except ValueError:
        return ()
