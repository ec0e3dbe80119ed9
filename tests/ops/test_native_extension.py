"""Why an extension is not there."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from hallo_numguard.ops import native_extension
from hallo_numguard.ops.backends import cpu

OURS = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
FOREIGN = "_native.cpython-27-m68k-linux-gnu.so"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package without extensions, whose module is asked."""
    folder = tmp_path / "elsewhere"
    (folder / "ops").mkdir(parents=True)
    shutil.copy(str(native_extension.__file__), folder / "ops" / "native_extension.py")
    monkeypatch.setattr(native_extension, "__file__", str(folder / "ops" / "native_extension.py"))
    hidden = importlib.import_module("hallo_numguard")
    monkeypatch.setattr(hidden, "__path__", [str(folder)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # not that of an editable installation
    monkeypatch.delitem(sys.modules, "hallo_numguard._native", raising=False)
    monkeypatch.delattr(hidden, "_native", raising=False)
    native_extension._load.cache_clear()
    yield folder
    native_extension._load.cache_clear()


CAUSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "it was not built"),
    "another_python": (lambda folder: (folder / FOREIGN).touch(), f"it was built for another Python: {FOREIGN}"),
    "damaged": (
        lambda folder: (folder / OURS).write_bytes(b"no library"),
        "it does not load: .*(invalid ELF|too short)",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's messages are those of Linux")
@pytest.mark.parametrize(("prepare", "message"), CAUSES.values(), ids=CAUSES)
def test_why_there_is_no_extension(package: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(package)
    assert native_extension.extension() is None
    reason = cpu.unavailable("cpu")
    assert reason is not None
    assert "HALLO_NUMGUARD_BUILD_NATIVE=1" in reason
    assert re.search(message, reason)
