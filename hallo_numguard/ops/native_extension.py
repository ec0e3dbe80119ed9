"""The optional compiled modules: CPU kernels with the reader of tensor lists, CUDA kernels."""

from __future__ import annotations

import functools
import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

_NATIVE, _CUDA = "_native", "_native_cuda"


def extension() -> ModuleType | None:
    """Returns the module with the CPU kernels; None if it was not built, or does not load."""
    return _load(_NATIVE)[0]


def cuda_extension() -> ModuleType | None:
    """Returns the module with the CUDA kernels; None if it was not built, or does not load."""
    return _load(_CUDA)[0]


def why_missing() -> str | None:
    """Returns why `extension` gives None, in words; None if it gives the module."""
    return _load(_NATIVE)[1]


def why_cuda_missing() -> str | None:
    """Returns why `cuda_extension` gives None, in words; None if it gives the module."""
    return _load(_CUDA)[1]


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """Returns the module, or why there is none."""
    try:
        return importlib.import_module(f"hallo_numguard.{name}"), None
    except ImportError as error:
        files = {path.name for path in Path(__file__).parent.parent.glob(f"{name}.*")}
        if any(f"{name}{suffix}" in files for suffix in EXTENSION_SUFFIXES):
            return None, f"it does not load: {error}"  # a library that it needs is missing, or of another version
    if files:
        return None, f"it was built for another Python: {', '.join(sorted(files))}"
    return None, "it was not built"
