"""What is in the files of a folder: digests of the whole, and of each tensor with its record. One read of each file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Record
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, UnknownLayout, open_source
from hallo_numguard.files.manifest.statement import ALGORITHM, FileContents, TensorFacts
from hallo_numguard.files.scan.reading import FileFacts, read_file
from hallo_numguard.ops.formats import dtype_name

Progress = Callable[[int, int], object]
Digests = Mapping[str, Mapping[str, str]]
"""In hexadecimal, by algorithm (as hashlib names it), then by the name of the file."""


@dataclass(frozen=True)
class FolderFacts:
    """What was read.

    Attributes:
        digests: Of every file.
        contents: Size and tensors of every file, by name.
        findings: Errors are files that could not be read. What has no readable tensors, though it should have, is less.
    """

    digests: Digests
    contents: Mapping[str, FileContents]
    findings: tuple[Finding, ...]

    def in_words(self) -> str:
        """Returns how much it is."""
        tensors = sum(len(file.tensors) for file in self.contents.values())
        size = sum(file.size for file in self.contents.values())
        return f"{len(self.contents)} files, {tensors} tensors, {size / 1e6:,.1f} MB"


def read_folder(
    root: Path, files: Mapping[str, Path], algorithms: Sequence[str], progress: Progress | None = None
) -> FolderFacts:
    """Returns what is in files of a folder.

    Args:
        root: The folder; its files say together what the tensors are called.
        files: Those to read, by name.
        algorithms: Of the digests of whole files; those of tensors are sha256.
        progress: Called with the number of bytes just read and of all bytes, by several threads.

    Cost: every file is read once, several at a time.
    """
    entries, findings = _entries(root, files)
    readings = _read_all(files, entries, algorithms, progress)
    contents = {
        name: FileContents(facts.nbytes, tuple(map(_tensor, entries[name], facts.records, facts.tensor_digests)))
        for name, (facts, _) in readings.items()
        if facts is not None
    }
    findings += [finding for _, found in readings.values() for finding in found]
    return FolderFacts(_by_algorithm(readings, algorithms), contents, tuple(findings))


def read_digests(
    files: Mapping[str, Path], algorithms: Sequence[str], progress: Progress | None = None
) -> tuple[Digests, list[Finding]]:
    """Returns the digests of whole files, and a finding for each that cannot be read.

    Cost: every file is read once, several at a time.
    """
    readings = _read_all(files, {}, algorithms, progress)
    return _by_algorithm(readings, algorithms), [finding for _, found in readings.values() for finding in found]


def sources(root: Path, files: Iterable[Path]) -> Iterator[Source]:
    """Yields a folder as a whole, if it is of a known layout, and each of `files` that is no part of that."""
    known: set[Path] = set()
    for path in (root, *files):
        if path in known:
            continue
        try:
            source = open_source(path)
        except UnknownLayout:
            continue
        known.update(source.files)
        yield source


_Reading = tuple[FileFacts | None, list[Finding]]


def _read_all(
    files: Mapping[str, Path],
    entries: Mapping[str, Sequence[TensorEntry]],
    algorithms: Sequence[str],
    progress: Progress | None,
) -> dict[str, _Reading]:
    total = sum(map(_size, files.values()))
    advance = partial(_advance, progress, total) if progress else None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = partial(_read, algorithms=algorithms, progress=advance)
        readings = pool.map(read, files, files.values(), (entries.get(name, ()) for name in files))
        return dict(zip(files, readings, strict=True))


def _advance(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # it will be a finding when it is read


def _read(
    name: str,
    path: Path,
    entries: Sequence[TensorEntry],
    algorithms: Sequence[str],
    progress: Callable[[int], object] | None,
) -> _Reading:
    """One read of a file; a second one, of the bytes alone, if it does not hold the tensors that it should."""
    try:
        return read_file(path, entries, algorithms, tensor_hash=ALGORITHM if entries else None, progress=progress), []
    except DamagedFile as error:
        finding = replace(error.finding(path), file=name)
    except OSError as error:
        finding = Finding("unreadable_file", f"{name} cannot be read: {error.strerror}", severity="error", file=name)
    if not entries:
        return None, [finding]
    facts, more = _read(name, path, (), algorithms, None)
    return facts, more or [_lesser(finding)]


def _by_algorithm(readings: Mapping[str, _Reading], algorithms: Sequence[str]) -> Digests:
    return {
        algorithm: {name: facts.digests[algorithm] for name, (facts, _) in readings.items() if facts is not None}
        for algorithm in algorithms
    }


def _entries(root: Path, files: Mapping[str, Path]) -> tuple[dict[str, list[TensorEntry]], list[Finding]]:
    """The tensors in each file, and what shows of damage when they are looked for."""
    names = {path: name for name, path in files.items()}
    entries: dict[str, list[TensorEntry]] = {name: [] for name in files}
    findings: list[Finding] = []
    for source in sources(root, files.values()):
        for entry in source.entries:
            if entry.file in names:
                entries[names[entry.file]].append(entry)
        named = (replace(finding, file=names.get(Path(finding.file), finding.file)) for finding in source.findings)
        findings += map(_lesser, named)
        findings += [Finding("no_tensors", sentence, severity="info") for sentence in source.unchecked]
    return entries, findings


def _lesser(finding: Finding) -> Finding:
    """The finding as one that does not keep the file's bytes from being listed."""
    return replace(finding, severity="warning") if finding.severity == "error" else finding


def _tensor(entry: TensorEntry, record: Record | None, digest: str) -> TensorFacts:
    return TensorFacts(
        entry.name,
        entry.role,
        entry.rank,
        entry.start,
        entry.corner,
        dtype_name(entry.dtype),
        entry.shape,
        digest,
        record,
    )
