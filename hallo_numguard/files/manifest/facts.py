"""Reads the files of a folder once: digests of each file, and of each tensor with its statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, UnknownLayout, open_source
from hallo_numguard.files.formats.file_access import file_size
from hallo_numguard.files.manifest.statement import ALGORITHM, FileContents, TensorFacts
from hallo_numguard.files.scan.reading import ScannedFile, ScannedTensor, read_file
from hallo_numguard.ops.formats import dtype_name

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class FolderFacts:
    """The files of a folder as they were read.

    Attributes:
        digests: Hexadecimal digest of each file, by algorithm (as hashlib names it), then by name.
        contents: Size and tensors of each file, by name.
        findings: Errors are files that could not be read, warnings are tensors that could not.
    """

    digests: Mapping[str, Mapping[str, str]]
    contents: Mapping[str, FileContents]
    findings: tuple[Finding, ...]

    def summary(self) -> str:
        """Returns the number of files, tensors and bytes in words."""
        tensors = sum(len(file.tensors) for file in self.contents.values())
        size = sum(file.size for file in self.contents.values())
        return f"{len(self.contents)} files, {tensors} tensors, {size / 1e6:,.1f} MB"


def read_folder(
    root: Path,
    files: Mapping[str, Path],
    algorithms: Sequence[str],
    progress: Progress | None = None,
    *,
    tensors: bool = True,
) -> FolderFacts:
    """Reads files of a folder, each once, several at a time.

    Args:
        root: The folder: the names of tensors may depend on all of its files.
        files: Files to read, by name.
        algorithms: Algorithms for digests of whole files; those of tensors are sha256.
        progress: Called by several threads with the number of bytes just read, and the total.
        tensors: Whether to read tensors too, beside the files' digests.
    """
    entries, findings = _entries(root, files) if tensors else ({}, [])
    total = sum(map(file_size, files.values()))
    advance = partial(_advance, progress, total) if progress else None
    read = partial(_read, algorithms=algorithms, progress=advance)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read, files, files.values(), (entries.get(name, ()) for name in files)))
    scanned = {name: file for name, (file, _) in zip(files, results, strict=True) if file is not None}
    return FolderFacts(
        {algorithm: {name: file.digests[algorithm] for name, file in scanned.items()} for algorithm in algorithms},
        {name: FileContents(file.nbytes, tuple(map(_facts, file.tensors))) for name, file in scanned.items()},
        (*findings, *(finding for _, found in results for finding in found)),
    )


def sources(root: Path, files: Iterable[Path]) -> Iterator[Source]:
    """Yields a folder as one source, if its layout is known, and each of `files` that is not part of it."""
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


def _advance(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def _read(
    name: str,
    path: Path,
    entries: Sequence[TensorEntry],
    algorithms: Sequence[str],
    progress: Callable[[int], object] | None,
) -> tuple[ScannedFile | None, list[Finding]]:
    """Reads a file; a second time, for its digests alone, if it is too damaged for its tensors to be read."""
    try:
        return read_file(path, entries, algorithms, tensor_hash=ALGORITHM if entries else None, progress=progress), []
    except DamagedFile as error:
        finding = replace(error.finding(path), file=name)
    if not entries:
        return None, [finding]
    file, more = _read(name, path, (), algorithms, None)
    return file, more or [_as_warning(finding)]


def _entries(root: Path, files: Mapping[str, Path]) -> tuple[dict[str, list[TensorEntry]], list[Finding]]:
    """The tensors in each file, and damage in the structure of files."""
    names = {path: name for name, path in files.items()}
    entries: dict[str, list[TensorEntry]] = {name: [] for name in files}
    findings: list[Finding] = []
    for source in sources(root, files.values()):
        for entry in source.entries:
            if entry.file in names:
                entries[names[entry.file]].append(entry)
        listed = (finding for finding in source.findings if not _is_about_a_link(finding, names))
        renamed = (replace(finding, file=names.get(Path(finding.file), finding.file)) for finding in listed)
        findings += map(_as_warning, renamed)
        findings += [Finding("no_tensors", sentence, severity="info") for sentence in source.unchecked]
    return entries, findings


def _is_about_a_link(finding: Finding, names: Mapping[Path, str]) -> bool:
    """Whether a finding is about a link out of the folder, whose file is not listed."""
    file = Path(finding.file)
    return finding.kind == "escape" or (file not in names and file.is_symlink())


def _as_warning(finding: Finding) -> Finding:
    """An error as a warning: the file's bytes can be listed nevertheless."""
    return replace(finding, severity="warning") if finding.severity == "error" else finding


def _facts(tensor: ScannedTensor) -> TensorFacts:
    entry = tensor.entry
    return TensorFacts(
        entry.name,
        entry.role,
        entry.rank,
        entry.start,
        entry.corner,
        dtype_name(entry.dtype),
        entry.shape,
        tensor.digest,
        tensor.record,
    )
