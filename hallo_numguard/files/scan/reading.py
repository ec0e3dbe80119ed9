"""One read of a file for everything: statistics of tensors, digests, checksums, and pages of zeros or repeats.

The file is divided into spans. A thread reads a span into a buffer that it reuses, so that the bytes stay in the cache
while everything is computed from them. Parts of a tensor are merged in file order: results do not depend on the number
of threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.records import Record
from hallo_numguard.files.formats.file_access import opened
from hallo_numguard.files.formats.source import Checksum, DamagedFile, TensorEntry
from hallo_numguard.files.scan.converted import PARTS, of_complex, record_of
from hallo_numguard.files.scan.pages import Pages
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.table import StatsTable

crc32_combine: Callable[[int, int, int], int] | None
try:
    from isal.isal_zlib import crc32, crc32_combine  # five times as fast
except ImportError:
    from zlib import crc32

    crc32_combine = None

_MIN_SPAN_BYTES, _MAX_SPAN_BYTES = 1 << 20, 8 << 20  # large spans: threads wait less often for the interpreter lock
_SPANS_PER_FILE = 64  # between those bounds, so that all threads have work until the end
_MARGIN = 16  # bytes read beyond a span, for an element that begins in it and ends behind it
_MAX_OVERLAP = 8  # times the size of the file that its tensors may add up to
_DISK_REMEDY = "Check the disk (dmesg, smartctl) and copy the file from elsewhere."
_EMPTY = Record(nan=0, pos_inf=0, neg_inf=0, absmax=0.0, sumsq=0.0, first_nonfinite=-1)


@dataclass(frozen=True)
class ScannedTensor:
    """A tensor whose bytes were read.

    Attributes:
        entry: Place of the tensor.
        record: Statistics of its values; None for dtypes without NaN (integers).
        digest: Hexadecimal digest of its bytes, "" if not requested.
    """

    entry: TensorEntry
    record: Record | None
    digest: str = ""


@dataclass(frozen=True)
class ScannedFile:
    """A file that was read.

    Attributes:
        path: The file.
        nbytes: Size of the file in bytes.
        digests: Hexadecimal digests of the whole file, by algorithm.
        tensors: Tensors, in the order of the entries.
        mismatches: Stored checksums that differ from those of the bytes.
        zero_pages: Runs of 4 KiB pages that are all zeros: offset and number of bytes.
        repeated_pages: Runs of pages equal to earlier ones: offset, offset of the earlier ones, number of bytes.
    """

    path: Path
    nbytes: int
    digests: Mapping[str, str]
    tensors: tuple[ScannedTensor, ...]
    mismatches: tuple[Checksum, ...] = ()
    zero_pages: tuple[tuple[int, int], ...] = ()
    repeated_pages: tuple[tuple[int, int, int], ...] = ()


def read_file(
    path: Path,
    entries: Sequence[TensorEntry] = (),
    hashes: Sequence[str] = ("sha256",),
    *,
    tensor_hash: str | None = None,
    checksums: Sequence[Checksum] = (),
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> ScannedFile:
    """Reads a file once.

    Every byte is read once, and repeated pages once more. Memory: a buffer of 1 to 8 MiB per thread, and
    8 bytes per page. Digests are sequential: with them spans are read in order, and computed on in parallel.

    Args:
        path: The file.
        entries: Tensors in the file.
        hashes: Digests of the whole file: names from `hashlib`, or "blake3" if that is installed.
        tensor_hash: Digest of each tensor's bytes (default: none).
        checksums: Checksums that the file stores for parts of itself.
        threads: Reader threads (default: number of CPUs).
        progress: Called with each number of bytes read.

    Raises:
        DamagedFile: If it cannot be read, is no regular file, is shorter than its tensors, or shrinks meanwhile.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        reader = _SpanReader(descriptor, size, entries, checksums, progress or (lambda nbytes: None))
        workers = threads or len(os.sched_getaffinity(0))
        digests = _Digests(hashes, [tensor_hash] * len(entries) if tensor_hash else [])
        try:
            if hashes or tensor_hash or (checksums and crc32_combine is None):
                _read_in_order(reader, workers, digests)
            else:
                _read_in_any_order(reader, workers)
            zero, repeated = reader.pages.runs(descriptor)
        except OSError as error:
            cause = f"cannot be read: {error.strerror}"
            raise DamagedFile(cause, kind="unreadable_file", remedy=_DISK_REMEDY) from error
    tensor_digests = [hasher.hexdigest() for hasher in digests.tensors] or [""] * len(entries)
    return ScannedFile(
        path,
        size,
        {name: hasher.hexdigest() for name, hasher in digests.whole.items()},
        tuple(map(ScannedTensor, entries, reader.records(), tensor_digests)),
        reader.mismatches(),
        zero,
        repeated,
    )


@dataclass(frozen=True)
class _Run:
    """Bytes of the file that hold elements of one dtype; several entries may share them."""

    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass
class _Span:
    """Part of the file that is read at once, and the rows of the runs, checksums and entries that it touches."""

    begin: int
    end: int
    runs: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    def overlap(self, offset: int, nbytes: int) -> tuple[int, int]:
        """Returns where a run of bytes begins and ends inside the span, counted from the span's begin."""
        return max(self.begin, offset) - self.begin, min(self.end, offset + nbytes) - self.begin


class _SpanReader:
    """The spans of a file, and what was computed from them so far. Threads call its methods on different spans."""

    def __init__(
        self,
        descriptor: int,
        size: int,
        entries: Sequence[TensorEntry],
        checksums: Sequence[Checksum],
        progress: Callable[[int], object],
    ) -> None:
        self.descriptor = descriptor
        self.size = size
        self.entries = entries
        self.pages = Pages(size)
        self.only_scans = not checksums and dispatch.runs_natively("cpu")
        self._checksums = checksums
        self._progress = progress
        dtypes = [PARTS.get(entry.dtype, entry.dtype) for entry in entries]
        self._run_of_entry = [
            _Run(entry.offset, entry.nbytes, dtype) if dtype in FORMATS else None
            for entry, dtype in zip(entries, dtypes, strict=True)
        ]
        self._runs = list(dict.fromkeys(run for run in self._run_of_entry if run is not None))
        self._check_extent()
        self._tables: list[tuple[list[tuple[int, int]], StatsTable, int]] = []
        self._crcs: dict[int, list[tuple[int, int, int]]] = {row: [] for row in range(len(checksums))}
        self.span_bytes = min(max(size // _SPANS_PER_FILE >> 20 << 20, _MIN_SPAN_BYTES), _MAX_SPAN_BYTES)
        self.spans = [_Span(begin, min(begin + self.span_bytes, size)) for begin in range(0, size, self.span_bytes)]
        for row, run in enumerate(self._runs):
            for span in self._touched(run.offset, run.nbytes):
                span.runs.append(row)
        for row, checksum in enumerate(checksums):
            for span in self._touched(checksum.offset, checksum.nbytes):
                span.checksums.append(row)
        for row, entry in enumerate(entries):
            for span in self._touched(entry.offset, entry.nbytes):
                span.entries.append(row)

    def buffer(self) -> memoryview:
        """Returns a buffer for a span."""
        return memoryview(bytearray(self.span_bytes + _MARGIN))

    def fill(self, buffer: memoryview, span: _Span) -> None:
        """Reads a span, and the margin behind it where the file goes on."""
        wanted = min(span.end + _MARGIN, self.size) - span.begin
        done = 0
        while done < wanted:
            nbytes = os.preadv(self.descriptor, [buffer[done:wanted]], span.begin + done)
            if nbytes == 0:
                raise _shrunk()
            done += nbytes
        self._progress(span.end - span.begin)

    def scan(self, span: _Span) -> None:
        """Reads and scans a span block by block in one native call, for files without checksums."""
        runs = [self._runs[row] for row in span.runs]
        places = [(run.offset, run.nbytes // run.dtype.itemsize, run.dtype) for run in runs]
        words = self.pages.words(span.begin, span.end)
        try:
            packed = native.scan_file(self.descriptor, span.begin, span.end, places, words)
        except EOFError:
            raise _shrunk() from None
        self._tables.append(([(row, 0) for row in span.runs], StatsTable(packed, False), span.begin))
        self._progress(span.end - span.begin)

    def compute(self, buffer: memoryview, span: _Span) -> None:
        """Computes everything but digests from the bytes of a span."""
        self._measure(buffer, span)
        self.pages.add(buffer, span.begin, span.end)
        for row in span.checksums:
            begin, end = span.overlap(self._checksums[row].offset, self._checksums[row].nbytes)
            parts = self._crcs[row]
            if crc32_combine is None:  # spans come in order
                parts[:] = [(0, 0, crc32(buffer[begin:end], parts[0][2] if parts else 0))]
            else:
                parts.append((span.begin, end - begin, crc32(buffer[begin:end])))

    def records(self) -> tuple[Record | None, ...]:
        """Returns the record of every entry."""
        parts: list[list[tuple[int, Record]]] = [[] for _ in self._runs]
        for places, table, _ in sorted(self._tables, key=lambda item: item[2]):
            for (row, first), record in zip(places, table.to_host(), strict=True):
                parts[row].append((first, record))
        merged = {run: _merged(parts[row]) for row, run in enumerate(self._runs)}
        return tuple(
            record_of(entry) if run is None else of_complex(merged[run]) if entry.dtype in PARTS else merged[run]
            for entry, run in zip(self.entries, self._run_of_entry, strict=True)
        )

    def mismatches(self) -> tuple[Checksum, ...]:
        """Returns the checksums that differ from those of the bytes."""
        return tuple(c for row, c in enumerate(self._checksums) if _combined(sorted(self._crcs[row])) != c.crc32)

    def _measure(self, buffer: memoryview, span: _Span) -> None:
        """Scans the elements that begin in a span."""
        pieces, places = [], []
        for row in span.runs:
            run = self._runs[row]
            size = run.dtype.itemsize
            first = max(0, -(-(span.begin - run.offset) // size))
            last = min(run.nbytes // size, -(-(span.end - run.offset) // size))
            if first < last:
                offset = run.offset + first * size - span.begin
                pieces.append(torch.frombuffer(buffer, dtype=run.dtype, count=last - first, offset=offset))
                places.append((row, first))
        if pieces:
            self._tables.append((places, multi_tensor_stats(pieces), span.begin))

    def _touched(self, offset: int, nbytes: int) -> Iterator[_Span]:
        if nbytes > 0:
            yield from self.spans[offset // self.span_bytes : (offset + nbytes - 1) // self.span_bytes + 1]

    def _check_extent(self) -> None:
        if any(entry.offset < 0 or entry.offset + entry.nbytes > self.size for entry in self.entries):
            raise DamagedFile("is shorter than its tensors")
        if sum(run.nbytes for run in self._runs) > _MAX_OVERLAP * self.size:
            raise DamagedFile("has tensors that overlap each other many times over")


class _Digests:
    """Hashers of the whole file, by algorithm, and of each tensor."""

    def __init__(self, whole: Sequence[str], tensors: Sequence[str]) -> None:
        self.whole = {name: _hasher(name) for name in whole}
        self.tensors = [_hasher(name) for name in tensors]

    def add_whole(self, name: str, data: memoryview) -> None:
        self.whole[name].update(data)

    def add_tensors(self, entries: Sequence[TensorEntry], buffer: memoryview, span: _Span) -> None:
        for row in span.entries:
            begin, end = span.overlap(entries[row].offset, entries[row].nbytes)
            self.tensors[row].update(buffer[begin:end])


def _read_in_any_order(reader: _SpanReader, workers: int) -> None:
    """Every thread takes the next span, reads it and computes on it."""
    spans = iter(reader.spans)
    lock = threading.Lock()
    stopped = threading.Event()

    def take() -> _Span | None:
        with lock:
            return None if stopped.is_set() else next(spans, None)

    def read_and_compute() -> None:
        buffer = reader.buffer()
        while (span := take()) is not None:
            reader.fill(buffer, span)
            reader.compute(buffer, span)

    def scan() -> None:
        while (span := take()) is not None:
            reader.scan(span)

    with _pool(workers) as pool:
        job = scan if reader.only_scans else read_and_compute
        try:
            for future in [pool.submit(job) for _ in range(min(workers, len(reader.spans)))]:
                future.result()
        finally:
            stopped.set()  # where the user interrupts it, threads end with the spans that they have


def _read_in_order(reader: _SpanReader, workers: int, digests: _Digests) -> None:
    """Reads one span after the other; while the next is read, the pool computes on the previous one."""
    buffers = (reader.buffer(), reader.buffer())
    pending: list[Future[None]] = []
    with _pool(workers) as pool:
        for number, span in enumerate(reader.spans):
            buffer = buffers[number % 2]
            reader.fill(buffer, span)
            for future in pending:
                future.result()
            data = buffer[: span.end - span.begin]
            pending = [pool.submit(digests.add_whole, name, data) for name in digests.whole]
            if digests.tensors:
                pending.append(pool.submit(digests.add_tensors, reader.entries, buffer, span))
            pending.append(pool.submit(reader.compute, buffer, span))
        for future in pending:
            future.result()


def _shrunk() -> DamagedFile:
    return DamagedFile("became shorter while it was read", remedy="Wait until it is completely written, and try again.")


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=native.stay_on_this_thread)


def _hasher(name: str) -> Any:
    if name == "blake3":
        from blake3 import blake3

        return blake3()
    return hashlib.new(name, usedforsecurity=False)


def _combined(parts: Sequence[tuple[int, int, int]]) -> int:
    """The CRC-32 of consecutive parts, each given as offset, number of bytes and CRC-32."""
    total = parts[0][2] if parts else 0
    if crc32_combine is not None:  # else the one part is the sum of all
        for _, nbytes, value in parts[1:]:
            total = crc32_combine(total, value, nbytes)
    return total


def _merged(parts: list[tuple[int, Record]]) -> Record:
    """The record of consecutive parts, each given with the position that its indices count from (csrc/record.h)."""
    total = _EMPTY
    for first, part in parts:
        position = total.first_nonfinite
        if position < 0 <= part.first_nonfinite:
            position = first + part.first_nonfinite
        total = Record(
            nan=total.nan + part.nan,
            pos_inf=total.pos_inf + part.pos_inf,
            neg_inf=total.neg_inf + part.neg_inf,
            absmax=max(total.absmax, part.absmax),
            sumsq=total.sumsq + part.sumsq,
            first_nonfinite=position,
        )
    return total
