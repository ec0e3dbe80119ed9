"""Fixtures that more than one test file uses."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from hallo_numguard.ops import dispatch, native


def pytest_configure(config: pytest.Config) -> None:
    """Lets Triton's interpreter run the kernels, which looks when they are defined; but for GPU tests."""
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


NATIVE = [f"native-{isa}" for isa in native.isas()]
TRITON = ["triton-interpreted"] if importlib.util.find_spec("triton") else []
BACKENDS = ["reference", *NATIVE, *TRITON]


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
    native.isa.cache_clear()


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend and every instruction set of this machine, one after the other."""
    with forced_backend(request.param) as name:
        yield name


@pytest.fixture(params=["reference", *NATIVE])
def each_cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that a CPU runs in earnest: what its floating-point state does to Triton's interpreter, no GPU would do."""
    with forced_backend(request.param) as name:
        yield name


@pytest.fixture(params=NATIVE)
def each_native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine."""
    with forced_backend(request.param) as name:
        yield name


@pytest.fixture
def cpu_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process and one thread on the CPU, and no state that Accelerate has left behind."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()
    torch.set_num_threads(threads)
