"""Files that a guard writes into a user's folder: a failure is said once, and of many files few are kept."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

_log = logging.getLogger("hallo_numguard")


class ReportFiles:
    """Writes files or folders, each of a kind, and deletes older ones that it has written.

    Args:
        what: What is written, for the log.
        keep: Number of the first files of each kind, and of the last files of all kinds, that are kept.
    """

    def __init__(self, what: str, keep: tuple[int, int]) -> None:
        self._what = what
        self._first, self._last = keep
        self._written: Counter[str] = Counter()  # by kind
        self._kept: set[Path] = set()  # the first of each kind
        self._recent: dict[Path, Sequence[str]] = {}  # the last of all kinds, oldest first, with the names in a folder
        self._fails = False

    def write(self, kind: str, write: Callable[[], Path], names: Sequence[str] = ()) -> Path | None:
        """Writes one. A full disk, a folder that cannot be used or an impossible path only costs this file.

        Args:
            kind: Kind of file.
            write: Writes it, and returns its path.
            names: Names of the files in it, if it is a folder.

        Returns:
            Its path; None if it could not be written.
        """
        try:
            path = write()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            if not self._fails:
                _log.error("%s could not be written; the next is tried again: %s", self._what, error)
            self._fails = True
            return None
        self._fails = False
        if path not in self._kept and path not in self._recent:
            self._add(kind, path, names)
        return path

    def _add(self, kind: str, path: Path, names: Sequence[str]) -> None:
        self._written[kind] += 1
        if self._written[kind] <= self._first:
            self._kept.add(path)
        self._recent[path] = names
        while len(self._recent) > self._last:
            oldest = next(iter(self._recent))
            names = self._recent.pop(oldest)
            if oldest not in self._kept:
                _delete(oldest, names)


def _delete(path: Path, names: Sequence[str]) -> None:
    """Deletes a file, or a folder with these files; a folder with others stays."""
    with contextlib.suppress(OSError, ValueError):
        if not names:
            path.unlink(missing_ok=True)
            return
        for name in names:
            (path / name).unlink(missing_ok=True)
        path.rmdir()
