"""Guards of engines that are taken off at the end of a test, and Accelerate as if nothing had used it."""

from __future__ import annotations

import pytest

import hallo_numguard as ng

import deepspeed_support as support


@pytest.fixture
def attach():
    """Returns `attach`, whose guards come off at the end."""
    guards = []

    def build(target, config=None, on_overflow=None):
        guards.append(ng.attach(target, config, on_overflow))
        return guards[-1]

    yield build
    for guard in guards:
        guard.detach()


@pytest.fixture
def make(attach):
    """Returns a function that returns an engine and its guard."""

    def build(setup="fp16", config=None, on_overflow=None, **options):
        engine = support.make_engine(setup, **options)
        return engine, attach(engine, config, on_overflow)

    return build


@pytest.fixture
def alone(monkeypatch):
    """One process, and no state of Accelerate that another test has left."""
    from accelerate.state import AcceleratorState, PartialState

    support.single_process_environment()
    support.allow_fp16()
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # they set it to true, for the whole process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
