"""The optional compiled modules: CPU kernels with the reader of tensor lists, CUDA kernels."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def extension() -> ModuleType | None:
    """Returns the module with the CPU kernels; None if it was not built."""
    return _load("_native")


@functools.cache
def cuda_extension() -> ModuleType | None:
    """Returns the module with the CUDA kernels; None if it was not built."""
    return _load("_native_cuda")


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"hallo_numguard.{name}")
    except ImportError:
        return None
