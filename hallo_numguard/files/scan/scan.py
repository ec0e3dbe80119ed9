"""The values of files: `scan` reads all of them once and says what no healthy model holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport, by_severity, merge
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, UnknownLayout, open_source
from hallo_numguard.files.scan.reading import FileFacts, read_file
from hallo_numguard.files.scan.value_rules import Measured, judge

Progress = Callable[[int, int], object]
_DISK_REMEDY = "Check the disk (dmesg, smartctl) and copy the file from elsewhere."


def scan(
    *paths: str | PathLike[str],
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Reads every tensor of files and folders, and reports what is damaged.

    Finds NaN, infinity, values that the training dtype cannot hold, weights that are all zeros, pages of zeros or of
    another place, values far above those of other layers, dtypes that differ between layers, bytes that are not those
    of the checksum; and all that is wrong with the structure of a file. See docs/preflight.md for what it cannot see.

    Args:
        paths: Files of weights, and folders of models or checkpoints, in any layout that `open_source` knows.
        dtype: That the weights will be trained in, such as "float16"; what the configuration beside them says if left
            out.
        threads: That read and compute; as many as there are CPUs if left out.
        progress: Called with the number of bytes just read and of all bytes.

    Returns:
        What was found, checked and not checked. Its `exit_code` is 0, 1 or 2.

    Raises:
        InvalidInput: If `dtype` is no dtype of floats.

    Cost: one read of every file; up to 8 MiB a thread and 8 bytes a page. No foreign code runs.
    """
    wanted = as_dtype(dtype)
    opened, unchecked = open_all(map(Path, paths))
    return merge([scan_opened(opened, wanted, threads, progress), PreflightReport(unchecked=unchecked)])


def open_all(paths: Iterable[Path]) -> tuple[list[Source], tuple[str, ...]]:
    """Returns the sources at the paths, and a sentence for each path that cannot be read or that no reader knows."""
    opened: list[Source] = []
    unchecked = []
    for path in paths:
        try:
            opened.append(open_source(path))
        except UnknownLayout as error:
            unchecked.append(str(error))
        except OSError as error:
            unchecked.append(f"{path} cannot be read: {error.strerror}")
    return opened, tuple(unchecked)


def scan_opened(
    opened: Sequence[Source], dtype: torch.dtype | None, threads: int | None, progress: Progress | None
) -> PreflightReport:
    """Scans sources that are open already; see `scan`."""
    total = sum(_size(file) for source in opened for file in _by_file(source.entries))
    report = progress or (lambda done, of: None)
    return merge([_scan(source, dtype, threads, lambda done: report(done, total)) for source in opened])


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype of that name.

    Raises:
        InvalidInput: If there is none, or it is none of floats.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInput(f"expected a dtype of floats such as float16 or bfloat16, got {dtype}")
    return found


def training_dtype(source: Source) -> torch.dtype | None:
    """Returns the dtype that the configuration in a source asks for; None if it does not, or names none."""
    try:
        return as_dtype(source.metadata.get("dtype"))
    except (InvalidInput, AttributeError):
        return None


def _scan(
    source: Source, dtype: torch.dtype | None, threads: int | None, progress: Callable[[int], object]
) -> PreflightReport:
    findings = list(source.findings)
    facts: list[FileFacts] = []
    measured: list[Measured] = []
    skipped: list[TensorEntry] = []
    for file, entries in _by_file(source.entries).items():
        try:
            fact = read_file(
                file,
                entries,
                (),
                checksums=[checksum for checksum in source.checksums if checksum.file == file],
                threads=threads,
                progress=progress,
            )
        except DamagedFile as error:
            findings.append(error.finding(file))
            continue
        except OSError as error:
            findings.append(_unreadable(file, error))
            continue
        facts.append(fact)
        for entry, record in zip(entries, fact.records, strict=True):
            if record is None:
                skipped.append(entry)
            else:
                measured.append(Measured(entry, record))
    findings += judge(measured, facts, dtype or training_dtype(source))
    return PreflightReport(by_severity(findings), (_checked(source, measured, skipped, facts),), source.unchecked)


def _by_file(entries: Iterable[TensorEntry]) -> dict[Path, list[TensorEntry]]:
    files: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        files.setdefault(entry.file, []).append(entry)
    return files


def _checked(source: Source, measured: list[Measured], skipped: list[TensorEntry], facts: list[FileFacts]) -> str:
    nbytes = sum(fact.nbytes for fact in facts)
    integers = f", and {len(skipped)} of integers, whose values can be anything" if skipped else ""
    return (
        f"{source.root} ({source.layout}): {len(measured)} tensors of floats{integers}, "
        f"in {len(facts)} files of {nbytes / 1e6:,.1f} MB"
    )


def _unreadable(file: Path, error: OSError) -> Finding:
    message = f"{file.name}: cannot be read: {error.strerror}"
    return Finding("unreadable", message, severity="error", file=str(file), remedy=_DISK_REMEDY)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
