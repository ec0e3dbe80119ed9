"""Rules for whole pages of a file: zeros where weights should be, pages at the wrong place, and checksums."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Sequence

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.source import DAMAGED_REMEDY, TensorEntry, load
from hallo_numguard.files.scan.measured import WEIGHTS, error
from hallo_numguard.files.scan.pages import PAGE
from hallo_numguard.files.scan.reading import ScannedFile

_EMBEDDING = re.compile(r"emb|wte|wpe|vocab|shared|lm_head", re.IGNORECASE)
_PACKED = re.compile(r"(qweight|weight_packed|packed|\.weight|_blocks)$")  # names of weights in integers


def check(file: ScannedFile) -> Iterator[Finding]:
    """Yields the findings of all these rules."""
    entries = _ByOffset([tensor.entry for tensor in file.tensors if _is_weight(tensor.entry)])
    yield from checksum_mismatches(file)
    yield from zero_pages(file, entries)
    yield from repeated_pages(file, entries)


def _is_weight(entry: TensorEntry) -> bool:
    is_number = entry.dtype.is_floating_point or entry.dtype.is_complex
    return entry.nbytes > 0 and (entry.role in WEIGHTS and (is_number or _PACKED.search(entry.name) is not None))


class _ByOffset:
    """Weights in the order of their places in the file."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.offset)
        self._offsets = [entry.offset for entry in self._entries]
        self._longest = max((entry.nbytes for entry in entries), default=0)

    def at(self, offset: int, nbytes: int) -> Iterator[TensorEntry]:
        """Yields those with bytes in part of the file."""
        first = bisect.bisect_right(self._offsets, offset - self._longest)
        for entry in self._entries[first : bisect.bisect_left(self._offsets, offset + nbytes)]:
            if offset < entry.offset + entry.nbytes:
                yield entry


def checksum_mismatches(file: ScannedFile) -> Iterator[Finding]:
    """Records whose CRC-32 is not the one stored in the file."""
    for checksum in file.mismatches:
        yield Finding(
            "checksum",
            f"{file.path.name}: the bytes of record {checksum.name} have changed since they were written (CRC-32)",
            severity="error",
            file=str(file.path),
            remedy=f"{DAMAGED_REMEDY} torch.load does not notice.",
        )


def zero_pages(file: ScannedFile, entries: _ByOffset) -> Iterator[Finding]:
    """Zeros that begin and end at page boundaries, in a weight with other values."""
    for offset, nbytes in file.zero_pages:
        for entry in entries.at(offset, nbytes):
            begin, end = max(offset, entry.offset), min(offset + nbytes, entry.offset + entry.nbytes)
            if not entry.dtype.is_floating_point and entry.nbytes - (end - begin) < 2 * PAGE:
                if not load(entry).any():
                    yield error("all_zero", entry, f"{entry.name} is all zeros ({entry.numel} packed values)")
                continue
            if end - begin >= PAGE and _was_lost(entry, begin, end):
                message = (
                    f"{end - begin} bytes of {entry.role} {entry.name} are zeros, exactly from page to page of the "
                    f"file (offset {begin}): they were not written"
                )
                yield error("zero_pages", entry, message)


def _was_lost(entry: TensorEntry, begin: int, end: int) -> bool:
    """Whether zeros end exactly with the pages, and are neither rows of an embedding nor the whole tensor."""
    if entry.stride is not None or end - begin == entry.nbytes:
        return False
    if not entry.dtype.is_floating_point:
        return _is_hole(entry, begin, end)
    values = load(entry).flatten()
    size = entry.dtype.itemsize
    first, last = -(-(begin - entry.offset) // size), (end - entry.offset) // size
    if (first > 0 and values[first - 1] == 0) or (last < values.numel() and values[last] == 0):
        return False
    row = math.prod(entry.whole_shape[1:])
    is_rows = (entry.start + first) % row == 0 and (entry.start + last) % row == 0
    return not (_EMBEDDING.search(entry.name) and is_rows)


def _is_hole(entry: TensorEntry, begin: int, end: int) -> bool:
    """Whether bytes that are no floats are zeros, and those around them hardly ever."""
    values = load(entry).view(torch.uint8).flatten()
    zeros = int((values == 0).sum()) - (end - begin)
    return zeros < (values.numel() - (end - begin)) // 8


def repeated_pages(file: ScannedFile, entries: _ByOffset) -> Iterator[Finding]:
    """Pages of a weight that repeat earlier ones of the file, while the values around them do not."""
    for offset, earlier, nbytes in file.repeated_pages:
        for entry in entries.at(offset, nbytes):
            if entry.offset <= offset and offset + nbytes <= entry.offset + entry.nbytes:
                origin = next(iter(entries.at(earlier, nbytes)), entry)
                if not _is_copy(entry, origin, offset, earlier, nbytes):
                    message = (
                        f"{nbytes} bytes of {entry.role} {entry.name} (offset {offset} of the file) are those of "
                        f"{origin.name} (offset {earlier}), exactly from page to page: written to the wrong place"
                    )
                    yield error("repeated_pages", entry, message)


def _is_copy(entry: TensorEntry, origin: TensorEntry, offset: int, earlier: int, nbytes: int) -> bool:
    """Whether the values around the pages are equal too: the model holds something twice."""
    values, others = load(entry).view(torch.uint8).flatten(), load(origin).view(torch.uint8).flatten()
    here, there = offset - entry.offset, earlier - origin.offset
    size = entry.dtype.itemsize
    if here == there == 0 and entry.nbytes == origin.nbytes:
        return bool(torch.equal(values, others))
    before = here >= size and there >= size and torch.equal(values[here - size : here], others[there - size : there])
    here, there = here + nbytes, there + nbytes
    after = torch.equal(values[here : here + size], others[there : there + size]) and here < entry.nbytes
    return before or after
