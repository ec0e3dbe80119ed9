"""Pages of a file that are all zeros or equal to others: disks lose whole pages, or write them to the wrong place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch

PAGE = 4096  # bytes
_WORD = 8  # bytes at the start of a page that stand for the page until they equal another's
_WORDS_PER_PAGE = PAGE // _WORD
_MAX_CANDIDATES = 65536  # pages that are read again for comparison
_MAX_PATTERN_WORDS = _WORDS_PER_PAGE // 8  # a page with no more different words is a pattern
_MAX_EQUAL_WORDS = 8  # pages with the same first word; more are a pattern, not a fault


class Pages:
    """One word per page: its first 8 bytes; 1 if these are zeros, 0 if all of the page is.

    Args:
        size: Size of the file in bytes. A partial page at the end is left out.
    """

    def __init__(self, size: int) -> None:
        self._words = np.zeros(size // PAGE, dtype=np.int64)

    def words(self, begin: int, end: int) -> torch.Tensor:
        """Returns the words of the pages between two offsets, the first a multiple of the page size, to be filled."""
        return torch.from_numpy(self._words)[begin // PAGE : end // PAGE]

    def add(self, buffer: memoryview, begin: int, end: int) -> None:
        """Fills in the words of the pages between two offsets from the bytes there."""
        first, last = begin // PAGE, end // PAGE
        pages = np.frombuffer(buffer, dtype=np.int64, count=(last - first) * _WORDS_PER_PAGE)
        pages = pages.reshape(-1, _WORDS_PER_PAGE)
        words = self._words[first:last]
        words[:] = pages[:, 0]
        for page in np.flatnonzero(words == 0):
            words[page] = bool(pages[page].any())

    def runs(self, descriptor: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int, int], ...]]:
        """Returns the runs of zero pages and of repeated pages, as `ScannedFile` has them."""
        zeros = ((page, 0) for page in np.flatnonzero(self._words == 0).tolist())
        return (
            tuple((first * PAGE, length * PAGE) for first, _, length in _runs(zeros, 0)),
            tuple(
                (first * PAGE, other * PAGE, length * PAGE)
                for first, other, length in _runs(self._repeated(descriptor), 1)
            ),
        )

    def _repeated(self, descriptor: int) -> Iterator[tuple[int, int]]:
        """Pairs of a page and the first one with the same bytes."""
        ordered = np.sort(self._words)
        words, repeats = np.unique(ordered[1:][ordered[1:] == ordered[:-1]], return_counts=True)
        candidates = np.isin(self._words, words[(words != 0) & (words != 1) & (repeats < _MAX_EQUAL_WORDS)])
        first_with: dict[bytes, int] = {}
        for page in np.flatnonzero(candidates)[:_MAX_CANDIDATES].tolist():
            data = os.pread(descriptor, PAGE, page * PAGE)
            first = first_with.setdefault(data, page)
            if first != page and len(set(memoryview(data).cast("q"))) > _MAX_PATTERN_WORDS:
                yield page, first


def _runs(pairs: Iterable[tuple[int, int]], step: int) -> Iterator[tuple[int, int, int]]:
    """The first pair and the length of each run in which the page goes up by one, and the other by `step`."""
    run: tuple[int, int, int] | None = None
    for page, other in pairs:
        if run is not None and (page, other) == (run[0] + run[2], run[1] + step * run[2]):
            run = (run[0], run[1], run[2] + 1)
            continue
        if run is not None:
            yield run
        run = (page, other, 1)
    if run is not None:
        yield run
