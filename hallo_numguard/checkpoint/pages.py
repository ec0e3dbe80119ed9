"""What the pages of a file look like: a disk loses, or writes to the wrong place, whole pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

PAGE = 4096  # bytes
_WORD = 8  # bytes at the start of a page that stand for it until it looks like another
_STEP = PAGE // _WORD
_MOST_CANDIDATES = 65536  # pages that are read again to see whether they are really the same
_MOST_ALIKE = 8  # pages with the same beginning; more are a pattern, not a fault


class Pages:
    """Collects a word a page.

    Args:
        size: Of the file, in bytes. A page that is cut off by its end is not looked at.
    """

    def __init__(self, size: int) -> None:
        self._words = np.zeros(size // PAGE, dtype=np.int64)
        self._zero: list[NDArray[np.int64]] = []

    def look(self, buffer: memoryview, begin: int, end: int, has_zeros: bool) -> None:
        """Looks at the bytes of a file from `begin`, a multiple of a page, to `end`; at all of them if it has zeros."""
        count = (end - begin) // PAGE
        if count == 0:
            return
        first = begin // PAGE
        words = np.frombuffer(buffer, dtype=np.int64, count=count * _STEP).reshape(count, _STEP)
        self._words[first : first + count] = words[:, 0]
        if has_zeros:
            self._zero.append(np.flatnonzero(~words.any(axis=1)) + first)

    def runs(self, descriptor: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int, int], ...]]:
        """Returns the runs of zero pages (offset, bytes) and of repeated pages (offset, offset of the other, bytes)."""
        zero = sorted(np.concatenate(self._zero).tolist()) if self._zero else []
        zeros = tuple((first * PAGE, length * PAGE) for first, length in _runs(zero))
        pairs = dict(self._repeated(descriptor))
        repeated = []
        for first, length in _runs(sorted(pairs)):
            begin = first
            for page in range(first + 1, first + length + 1):  # a run ends where the other page is not the next one
                if page == first + length or pairs[page] != pairs[page - 1] + 1:
                    repeated.append((begin * PAGE, pairs[begin] * PAGE, (page - begin) * PAGE))
                    begin = page
        return zeros, tuple(repeated)

    def _repeated(self, descriptor: int) -> Iterator[tuple[int, int]]:
        """Pairs of a page and an earlier one with the same bytes."""
        words, place, counts = np.unique(self._words, return_inverse=True, return_counts=True)
        wanted = (counts > 1) & (counts <= _MOST_ALIKE) & (words != 0)
        groups: dict[int, dict[bytes, int]] = {}
        for page in np.flatnonzero(wanted[place])[:_MOST_CANDIDATES].tolist():
            data = os.pread(descriptor, PAGE, page * PAGE)
            first = groups.setdefault(int(place[page]), {}).setdefault(data, page)
            if first != page:
                yield page, first


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first number and the length of every run of numbers that follow each other."""
    first = length = 0
    for number in numbers:
        if length and number == first + length:
            length += 1
            continue
        if length:
            yield first, length
        first, length = number, 1
    if length:
        yield first, length
