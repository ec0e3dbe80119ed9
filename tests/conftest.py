"""Fixtures that more than one test file uses."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _pop_mode

from hallo_numguard.guard import containment
from hallo_numguard.integrations import backward_calls

import fork_server
from backends import BACKENDS, NATIVE, TRITON, forced_backend

LINEAR = torch.nn.functional.linear


def pytest_configure(config: pytest.Config) -> None:
    """Lets Triton's interpreter run the kernels, which looks when they are defined; but where there is a GPU to use.

    One thread a process: the workers of the tests, and the ranks that they start, share the cores. And inductor uses no
    instruction set: it would try each one that the machine has, with a compiler that takes some seconds each time.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="extensions-")
    if config.getoption("markexpr") != "gpu" and os.environ.get("DS_ACCELERATOR", "cpu") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        fork_server.start()


def pytest_collection_finish() -> None:
    """Keeps 9,000 tests out of later collections of garbage."""
    _set_aside()


def pytest_runtest_logfinish() -> None:
    """Keeps what a test leaves, modules above all, out of later collections of garbage; what is garbage goes."""
    _set_aside()


def _set_aside() -> None:
    """Makes the collector pass over what is there now. DeepSpeed calls it for every engine, 0.2 s each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails if something was compiled: an interrupted build of a DeepSpeed operator locks every later run out."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    compiled = [path.name for path in folder.rglob("*") if path.suffix in (".so", ".o", ".ninja")]
    shutil.rmtree(folder, ignore_errors=True)
    if compiled:
        sys.stderr.write(f"\nthe tests compiled {', '.join(compiled)}\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Lets the interpreter take down what was set aside: some libraries complain of what is left at its end."""
    gc.unfreeze()


# What a test calls, itself or through a fixture, and the marker that this earns it.
MARKER_OF_CALL = {
    "make_engine": "deepspeed",
    "run_ranks": "multiprocess",
    "run_engines": "multiprocess",
    "sync_playwright": "browser",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by what they call and by their folder; a slow test marks itself."""
    for item in items:
        fixtures = [fixture.func for group in item._fixtureinfo.name2fixturedefs.values() for fixture in group]
        for function in (item.function, *fixtures):
            for name in inspect.unwrap(function).__code__.co_names:
                if name in MARKER_OF_CALL:
                    item.add_marker(MARKER_OF_CALL[name])
        if item.path.parent.name == "deepspeed":
            item.add_marker("deepspeed")


@pytest.fixture(autouse=True)
def nothing_contained(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which the guard failed and went on without a word to the test: all its silence proves nothing.

    Tests that plant a failure of ours are marked `contains_failures`.
    """
    containment.contained.clear()
    yield
    failures = list(containment.contained)
    containment.contained.clear()
    if failures and request.node.get_closest_marker("contains_failures") is None:
        pytest.fail(f"the guard failed in its {failures[0][0]}: {failures[0][1]!r}; see the captured log")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name in TRITON else []) for name in BACKENDS])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend and every instruction set of this machine, one after the other."""
    with forced_backend(request.param) as name:
        yield name


@pytest.fixture(params=["reference", "torch", *NATIVE])
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


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Puts back what would change the tests that follow in this process.

    A guard that a test has left in the middle of a watched step has begun a mode; one that is still attached would see
    the backward passes of others; DeepSpeed's stage 3 replaces torch's linear layer for good, so that its gradients
    become ready in another order.
    """
    yield
    for observer in list(backward_calls._patch._observers):
        observer.stop()
    torch.nn.functional.linear = LINEAR
    while torch._C._len_torch_dispatch_stack():
        _pop_mode()
    torch.autograd.set_detect_anomaly(False)
