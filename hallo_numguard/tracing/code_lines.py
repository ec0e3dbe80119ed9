"""Lines of the user's code, or of a library's, behind an operation."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent.parent) + os.sep
_SKIPPED = (_TORCH, _OURS, "<")
_STANDS_IN = f"deepspeed{os.sep}runtime{os.sep}zero{os.sep}linear.py"  # for torch.nn.functional.linear
_OUR_WORK = tuple(f"{_OURS}{room}{os.sep}" for room in ("guard", "ops", "tracing"))
_PASSES_ON = f"{_OURS}guard{os.sep}guard.py"  # which calls the user's step
_RERUN = str(Path(__file__).parent / "rerun.py")
"""Where a pass is run again: what called that is the line of a step, and not of the pass."""
_WIDTH = 120  # characters of a line that are shown
_ENTRY = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n\s*(?P<text>[^\n]*))?')


def calling_line() -> str | None:
    """Returns the nearest calling line that is neither torch's nor ours, as "train.py:12 in loss: x / y"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _RERUN:
            return None
        if not _is_skipped(code.co_filename):
            text = linecache.getline(code.co_filename, frame.f_lineno)
            return _in_words(code.co_filename, frame.f_lineno, code.co_name, text)
        frame = frame.f_back
    return None


def is_our_work() -> bool:
    """Returns whether the operation above our caller is one that the guard itself makes, in a hook for example."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, "<")):
        frame = frame.f_back  # type: ignore[assignment]
    file = "" if frame is None else frame.f_code.co_filename
    return file.startswith(_OUR_WORK) and file != _PASSES_ON


def line_in_traceback(entries: Sequence[str]) -> str | None:
    """Returns the innermost line of a traceback of `traceback.format_stack` that is neither torch's nor ours."""
    for entry in reversed(entries):
        found = _ENTRY.match(entry)
        if found and found["file"] == _RERUN:
            return None
        if found and not _is_skipped(found["file"]):
            return _in_words(found["file"], int(found["line"]), found["function"], found["text"] or "")
    return None


def _is_skipped(file: str) -> bool:
    return file.startswith(_SKIPPED) or file.endswith(_STANDS_IN)


def is_recomputed() -> bool:
    """Returns whether the present operation is one of a forward pass that checkpointing repeats in a backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "checkpoint" in name and frame.f_code.co_name in ("unpack_hook", "backward", "recompute_fn"):
            return True
        frame = frame.f_back
    return False


def _in_words(file: str, line: int, function: str, text: str) -> str:
    where = "" if function == "<module>" else f" in {function}"
    code = " ".join(text.split())
    return f"{_short(file)}:{line}{where}: {code[:_WIDTH]}"


def _short(file: str) -> str:
    """A path below the present folder or that of an installed package, else the file's name."""
    path = Path(file)
    for part in ("site-packages", "dist-packages"):
        if part in path.parts:
            return "/".join(path.parts[path.parts.index(part) + 1 :])
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return path.name
