"""Runs the benchmarks' scripts, for their tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.native_extension import extension

import fork_server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

needs_native = pytest.mark.skipif(extension() is None, reason="the extension was not built, and it is what is measured")


_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of other tests


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in (dispatch.BACKEND_VARIABLE, native.ISA_VARIABLE, *_OF_RANKS)
    }
    return subprocess.run(
        [*fork_server.command(), *arguments],
        cwd=BENCHMARKS,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
