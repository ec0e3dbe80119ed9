"""For tests of what only a GPU can show."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from hallo_numguard.ops.backends import triton


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if os.environ.get(triton.INTERPRET_VARIABLE) == "1":
        return "Triton's interpreter is on, which cannot read a GPU's memory: run these alone, with pytest -m gpu"
    return None


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]


@contextlib.contextmanager
def host_sync_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def host_syncs() -> Iterator[list[warnings.WarningMessage]]:
    """Gives a list of the calls that made the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
            caught[:] = [warning for warning in caught if "synchroniz" in str(warning.message)]
