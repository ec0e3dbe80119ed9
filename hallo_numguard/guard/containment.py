"""Failures of the guard's own code: contained, logged once, and shown to the tests."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_log = logging.getLogger("hallo_numguard")

P = ParamSpec("P")
T = TypeVar("T")

MAX_REMEMBERED = 100

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
            "hallo_numguard failed in its %s: %s; training goes on", self._probe, self._consequence, exc_info=error
        )
        return True


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
