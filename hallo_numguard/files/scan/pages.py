"""What the pages of a file look like: a disk loses, or writes to the wrong place, whole pages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch

PAGE = 4096  # bytes
_WORD = 8  # bytes at the start of a page that stand for it until it looks like another
_STEP = PAGE // _WORD
_MOST_CANDIDATES = 65536  # pages that are read again to see whether they are really the same
_FEW_WORDS = _STEP // 8  # different ones in a page of a pattern, at most
_MOST_ALIKE = 8  # pages with the same beginning; more are a pattern, not a fault


class Pages:
    """Collects a word a page: its first 8 bytes; 1 if they are zeros, and 0 if all of the page is.

    Args:
        size: Of the file, in bytes. A page that is cut off by its end is not looked at.
    """

    def __init__(self, size: int) -> None:
        self._words = np.zeros(size // PAGE, dtype=np.int64)

    def words(self, begin: int, end: int) -> torch.Tensor:
        """Returns the words of the whole pages from `begin`, a multiple of a page, to `end`, to be filled in."""
        return torch.from_numpy(self._words)[begin // PAGE : end // PAGE]

    def look(self, buffer: memoryview, begin: int, end: int) -> None:
        """Looks at the bytes of a file from `begin`, a multiple of a page, to `end`."""
        first, last = begin // PAGE, end // PAGE
        pages = np.frombuffer(buffer, dtype=np.int64, count=(last - first) * _STEP).reshape(-1, _STEP)
        words = self._words[first:last]
        words[:] = pages[:, 0]
        for page in np.flatnonzero(words == 0):
            words[page] = bool(pages[page].any())

    def runs(self, descriptor: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int, int], ...]]:
        """Returns the runs of zero pages (offset, bytes) and of repeated pages (offset, offset of the other, bytes)."""
        zero = np.flatnonzero(self._words == 0).tolist()
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
        ordered = np.sort(self._words)
        words, counts = np.unique(
            ordered[1:][ordered[1:] == ordered[:-1]], return_counts=True
        )  # one less than there are
        candidates = np.flatnonzero(np.isin(self._words, words[(words != 0) & (words != 1) & (counts < _MOST_ALIKE)]))
        groups: dict[bytes, int] = {}
        for page in candidates[:_MOST_CANDIDATES].tolist():
            data = os.pread(descriptor, PAGE, page * PAGE)
            first = groups.setdefault(data, page)
            if first != page and len(set(memoryview(data).cast("q"))) > _FEW_WORDS:
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
