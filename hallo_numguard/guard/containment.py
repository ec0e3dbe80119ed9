"""Failures of the guard's own code: contained, logged on one line, kept for reports, and shown to the tests."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

_log = logging.getLogger("hallo_numguard")

P = ParamSpec("P")
T = TypeVar("T")

MAX_REMEMBERED = 100
MAX_MESSAGE = 200  # characters

contained: deque[tuple[str, Exception]] = deque(maxlen=MAX_REMEMBERED)
"""The last failures of this process with the probe that failed. The tests ask whether there are any."""


class contain_failures:
    """Context manager that keeps the guard's exceptions out of the user's run.

    Args:
        probe: Name of the work inside, for the log.
        consequence: Effect of a failure on the rest of the run, for the log.
    """

    def __init__(self, probe: str, consequence: str) -> None:
        self._probe = probe
        self._consequence = consequence

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Exception):  # KeyboardInterrupt and SystemExit are the user's
            return False
        contained.append((self._probe, error))
        _log.error(
            "hallo_numguard failed in its %s: %s; training goes on. %s",
            self._probe,
            self._consequence,
            _in_a_line(error),
        )
        _log.debug("the traceback of that failure", exc_info=error)
        return True


def failures() -> tuple[str, ...]:
    """Returns the failures of this process so far, each with its traceback: text for reports."""
    return tuple(f"{probe}: {''.join(traceback.format_exception(error))}" for probe, error in contained)


def _in_a_line(error: Exception) -> str:
    """The kind of error, the beginning of its message, and the line that raised it."""
    message = str(error).strip().partition("\n")[0][:MAX_MESSAGE]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


class Probes:
    """The guard's work beside the user's training, in independent parts: a part that fails is switched off."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def run(self, probe: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns what `work` returns; None if it fails, or `probe` has failed before."""
        if probe in self._failed:
            return None
        with contain_failures(probe, "it is switched off, all else stays on guard"):
            return work(*args, **kwargs)
        self._failed.add(probe)  # reached after a contained failure only
        return None
