"""DeepSpeed's compiled operators, as `make deepspeed-ops-test` has built them; tests never compile any."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / ".ops"
PIN_MEMORY = "pin_memory"  # the shared library that async_io needs


def file_of(name: str) -> Path:
    """Returns where an operator lies, once it is built."""
    return FOLDER / name / f"{name}.so"


def require(*names: str) -> None:
    """Loads operators in DeepSpeed's place, which would compile them; skips the test if one is not built."""
    needed = [PIN_MEMORY, *names] if "async_io" in names else names
    missing = [name for name in needed if not file_of(name).is_file()]
    if missing:
        pytest.skip(f"DeepSpeed's operators are not built: {', '.join(missing)}; `make deepspeed-ops-test` does that")
    load(*needed)


def load(*names: str) -> None:
    """Imports built operators, so that DeepSpeed finds them loaded: no compiler runs, and no lock is waited for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch  # noqa: F401 - the operators are linked against it
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name in names:
        if name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[name] = _imported(name)


def _imported(name: str) -> Any:
    path = file_of(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == PIN_MEMORY:  # as DeepSpeed loads it: its symbols are for the others too
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        sys._deepspeed_pin_memory_op_module = module
    return module
