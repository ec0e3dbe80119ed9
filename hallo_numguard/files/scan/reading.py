"""One read of a file for everything: the record of every tensor, digests, checksums, and what its pages look like.

A file is cut into spans. A thread reads a span into a buffer that it uses again and again, so that it stays in the
cache, and all that is wanted of these bytes is computed from there. Parts of a tensor are put together in the order in
which they lie in the file: results do not depend on the number of threads.
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
from hallo_numguard.files.scan import crc
from hallo_numguard.files.scan.pages import Pages
from hallo_numguard.ops import dispatch
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.table import StatsTable

_SMALL_SPAN, _LARGE_SPAN = 1 << 20, 8 << 20  # bytes; the larger, the more seldom threads wait for the interpreter
_SPANS = 64  # of a file between those two, so that no thread is left alone at the end
_MARGIN = 16  # bytes after a span that are read with it, for an element that begins in it and ends behind it
_MOST_READS = 8  # times the size of the file that overlapping tensors may take together
_EMPTY = Record(nan=0, pos_inf=0, neg_inf=0, absmax=0.0, sumsq=0.0, first_nonfinite=-1)


@dataclass(frozen=True)
class FileFacts:
    """What a read of a file has found.

    Attributes:
        path, nbytes: Of the file.
        digests: Hexadecimal, by the name of the algorithm.
        records: In the order of the entries; None for a dtype that the kernels do not read (integers).
        tensor_digests: Hexadecimal, in the order of the entries; empty if they were not asked for.
        mismatches: Checksums that are not those of the bytes.
        zero_pages: Runs of 4 KiB pages that are all zeros, where tensors of floats lie: offset and number of bytes.
        repeated_pages: Runs of pages that are the same as others before: offset, offset of the other, number of bytes.
    """

    path: Path
    nbytes: int
    digests: Mapping[str, str]
    records: tuple[Record | None, ...]
    tensor_digests: tuple[str, ...] = ()
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
) -> FileFacts:
    """Reads a file once, and returns all that was asked for.

    Args:
        path: Of the file.
        entries: Of the tensors in it.
        hashes: Algorithms of `hashlib`, or "blake3" if that is installed; for the whole file.
        tensor_hash: Likewise, for each entry's bytes; None for no digests of tensors.
        checksums: That the file holds of its parts.
        threads: That read and compute; as many as there are CPUs if left out.
        progress: Called with numbers of bytes as they are read.

    Raises:
        DamagedFile: If the file is no regular file, is shorter than its tensors, or shrinks while it is read.
        OSError: If the disk fails.

    Cost: every byte is read once (again only where a page looks like another); `threads` buffers of 1 to 8 MiB, and
    8 bytes a page. Digests are sequential: with them, spans are read in order, and computed on in parallel.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        reading = _Reading(descriptor, size, entries, checksums, progress or (lambda nbytes: None))
        workers = threads or len(os.sched_getaffinity(0))
        if hashes or tensor_hash:
            digests = _in_order(reading, workers, hashes, tensor_hash)
        else:
            _in_any_order(reading, workers)
            digests = _Digests({}, [])
        zero, repeated = reading.pages.runs(descriptor)
    return FileFacts(
        path,
        size,
        {name: hasher.hexdigest() for name, hasher in digests.whole.items()},
        reading.records(),
        tuple(hasher.hexdigest() for hasher in digests.tensors),
        reading.mismatches(),
        zero,
        repeated,
    )


@dataclass(frozen=True)
class _Run:
    """Bytes of the file that hold elements of one dtype; several entries may share it."""

    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass
class _Span:
    begin: int
    end: int
    runs: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)


class _Reading:
    """The spans of a file, and what was computed of them so far. Threads call `fill` and `compute` on their own."""

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
        self._run_of_entry = [_run(entry) for entry in entries]
        self._runs = list(dict.fromkeys(run for run in self._run_of_entry if run is not None))
        self._check_runs()
        self._tables: list[tuple[list[tuple[int, int]], StatsTable, int]] = []
        self._crcs: dict[int, list[tuple[int, int, int]]] = {row: [] for row in range(len(checksums))}
        self.span_bytes = min(max(size // _SPANS >> 20 << 20, _SMALL_SPAN), _LARGE_SPAN)
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

    def fill(self, buffer: memoryview, span: _Span) -> None:
        """Reads a span, and a few bytes more where there are some."""
        wanted = min(span.end + _MARGIN, self.size) - span.begin
        done = 0
        while done < wanted:
            got = os.preadv(self.descriptor, [buffer[done:wanted]], span.begin + done)
            if got == 0:
                raise DamagedFile(
                    "became shorter while it was read", remedy="Wait until it is written, then look again."
                )
            done += got
        self._progress(span.end - span.begin)

    def scan(self, span: _Span) -> None:
        """Reads a span and scans it block by block in one call, where nothing else has to see its bytes."""
        words = self.pages.words(span.begin, span.end)
        runs = [self._runs[row] for row in span.runs]
        places = [(run.offset, run.nbytes // run.dtype.itemsize, run.dtype) for run in runs]
        try:
            packed = native.scan_file(self.descriptor, span.begin, span.end, places, words)
        except EOFError:
            raise _shrunk() from None
        self._tables.append(([(row, 0) for row in span.runs], StatsTable(packed, False), span.begin))
        self._progress(span.end - span.begin)

    def compute(self, buffer: memoryview, span: _Span) -> None:
        """Adds what the bytes of a span tell, but for digests."""
        self._measure(buffer, span)
        self.pages.look(buffer, span.begin, span.end)
        for row in span.checksums:
            checksum = self._checksums[row]
            begin, end = _within(span, checksum.offset, checksum.nbytes)
            value = crc.crc32(buffer[begin - span.begin : end - span.begin])
            self._crcs[row].append((begin, end - begin, value))

    def records(self) -> tuple[Record | None, ...]:
        """The record of every entry."""
        parts: list[list[tuple[int, Record]]] = [[] for _ in self._runs]
        for places, table, _ in sorted(self._tables, key=lambda item: item[2]):
            for (row, first), record in zip(places, table.to_host(), strict=True):
                parts[row].append((first, record))
        merged = {run: _merged(parts[row]) for row, run in enumerate(self._runs)}
        return tuple(None if run is None else merged[run] for run in self._run_of_entry)

    def mismatches(self) -> tuple[Checksum, ...]:
        """Checksums that are not those of the bytes that were read."""
        parts = ([(nbytes, value) for _, nbytes, value in sorted(self._crcs[row])] for row in self._crcs)
        return tuple(c for c, part in zip(self._checksums, parts, strict=True) if crc.joined(part) != c.crc32)

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

    def _check_runs(self) -> None:
        if any(entry.offset < 0 or entry.offset + entry.nbytes > self.size for entry in self.entries):
            raise DamagedFile("is shorter than its tensors")
        if sum(run.nbytes for run in self._runs) > _MOST_READS * self.size:
            raise DamagedFile("has tensors that overlap each other many times over")


@dataclass
class _Digests:
    whole: dict[str, Any]
    tensors: list[Any]

    def add_whole(self, name: str, data: memoryview) -> None:
        self.whole[name].update(data)

    def add_tensors(self, entries: Sequence[TensorEntry], buffer: memoryview, span: _Span) -> None:
        for row in span.entries:
            begin, end = _within(span, entries[row].offset, entries[row].nbytes)
            self.tensors[row].update(buffer[begin - span.begin : end - span.begin])


def _in_any_order(reading: _Reading, workers: int) -> None:
    """Every thread takes the next span, reads it and computes on it."""
    spans = iter(reading.spans)
    lock = threading.Lock()

    def take() -> _Span | None:
        with lock:
            return next(spans, None)

    def work() -> None:
        buffer = _buffer(reading)
        while (span := take()) is not None:
            reading.fill(buffer, span)
            reading.compute(buffer, span)

    def scan() -> None:
        while (span := take()) is not None:
            reading.scan(span)

    with _pool(workers) as pool:
        job = scan if reading.only_scans else work
        for future in [pool.submit(job) for _ in range(min(workers, len(reading.spans)))]:
            future.result()


def _in_order(reading: _Reading, workers: int, hashes: Sequence[str], tensor_hash: str | None) -> _Digests:
    """Reads one span after the other; while the next is read, the pool computes on the one before."""
    tensors = [_hasher(tensor_hash) for _ in reading.entries] if tensor_hash else []
    digests = _Digests({name: _hasher(name) for name in hashes}, tensors)
    buffers = (_buffer(reading), _buffer(reading))
    pending: list[Future[None]] = []
    with _pool(workers) as pool:
        for number, span in enumerate(reading.spans):
            buffer = buffers[number % 2]
            reading.fill(buffer, span)
            for future in pending:
                future.result()
            data = buffer[: span.end - span.begin]
            pending = [pool.submit(digests.add_whole, name, data) for name in hashes]
            if tensor_hash:
                pending.append(pool.submit(digests.add_tensors, reading.entries, buffer, span))
            pending.append(pool.submit(reading.compute, buffer, span))
        for future in pending:
            future.result()
    return digests


def _shrunk() -> DamagedFile:
    return DamagedFile("became shorter while it was read", remedy="Wait until it is written, then look again.")


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=native.stay_on_this_thread)


def _hasher(name: str) -> Any:
    if name == "blake3":
        from blake3 import blake3

        return blake3()
    return hashlib.new(name, usedforsecurity=False)


def _buffer(reading: _Reading) -> memoryview:
    return memoryview(bytearray(reading.span_bytes + _MARGIN))


def _run(entry: TensorEntry) -> _Run | None:
    return _Run(entry.offset, entry.nbytes, entry.dtype) if entry.dtype in FORMATS else None


def _within(span: _Span, offset: int, nbytes: int) -> tuple[int, int]:
    """Where the bytes of a run begin and end that lie in a span."""
    return max(span.begin, offset), min(span.end, offset + nbytes)


def _merged(parts: list[tuple[int, Record]]) -> Record:
    """The record of all parts in order, each with the position that its indices count from (as `csrc/record.h`)."""
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
