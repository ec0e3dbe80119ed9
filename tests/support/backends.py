"""Every backend and instruction set of this machine, and how to force one."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native

NATIVE = [f"native-{isa}" for isa in native.isas() if isa != "zen4"]  # whose kernels are those of others
TRITON = ["triton-interpreted"] if importlib.util.find_spec("triton") else []
BACKENDS = ["reference", "torch", *NATIVE, *TRITON]


@contextlib.contextmanager
def forced_backend(name: str) -> Iterator[str]:
    """Makes every call go to one backend, and torch.empty give memory full of garbage."""
    backend, _, variant = name.partition("-")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as cleanup:
        patch.setenv(dispatch.BACKEND_VARIABLE, backend)
        if backend == "native":
            patch.setenv(native.ISA_VARIABLE, variant)
        if backend == "triton":
            import numpy

            cleanup.enter_context(numpy.errstate(all="ignore"))
        clear_choices()
        cleanup.callback(clear_choices)
        torch.use_deterministic_algorithms(True)
        cleanup.callback(torch.use_deterministic_algorithms, False)
        yield name


def clear_choices() -> None:
    """Makes the package look at the environment again."""
    dispatch.backend_for.cache_clear()
    dispatch.direct_calls.cache_clear()
    native.isa.cache_clear()
