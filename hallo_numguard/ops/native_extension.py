"""The compiled module with the CPU kernels and the fast reader of tensor lists; optional in an installation."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def extension() -> ModuleType | None:
    """Returns the extension module, or None if this installation has none."""
    try:
        from hallo_numguard import _native
    except ImportError:
        return None
    return _native
