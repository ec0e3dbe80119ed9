"""`scan`: reads every tensor value of files and folders once, and reports values that no healthy model holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport, by_severity, merge
from hallo_numguard.files.formats import Checksum, DamagedFile, Source, TensorEntry, UnknownLayout, open_source
from hallo_numguard.files.formats.file_access import file_size
from hallo_numguard.files.scan import scale_rules, state_rules, statistics_rules
from hallo_numguard.files.scan.reading import ScannedFile, read_file
from hallo_numguard.files.scan.value_rules import judge

Progress = Callable[[int, int], object]


def scan(
    *paths: str | PathLike[str],
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Reads every tensor of files and folders, and reports damage.

    Finds NaN and infinity, values that overflow the training dtype, weights that are all zeros or cannot be weights,
    zeroed or misplaced pages, values far above those of other layers, checksum errors, damage to the structure of a
    file, optimizer state that does not belong to its weights, and files of a folder that contradict each other. Its
    limits: docs/preflight.md.

    Reads every file once, with up to 8 MiB of memory per thread and 8 bytes per 4 KiB page. Runs no code from the
    files.

    Args:
        paths: Files of weights, and folders of models or checkpoints.
        dtype: Training dtype, such as "float16" (default: that of the configuration beside the weights).
        threads: Reader threads (default: number of CPUs).
        progress: Called with the number of bytes just read, and the total.

    Returns:
        Report with findings; its `exit_code` is 0 without errors and warnings, 1 with some, 2 if something could not
        be read. Files of other formats beside weights are listed as not read.

    Raises:
        InvalidInput: If `dtype` is not a floating-point dtype.
    """
    training_dtype = as_dtype(dtype)
    opened, unchecked = open_all(map(Path, paths))
    return merge([scan_opened(opened, training_dtype, threads, progress), PreflightReport(unchecked=unchecked)])


def open_all(paths: Iterable[Path]) -> tuple[list[Source], tuple[str, ...]]:
    """Returns the sources at the paths, and a sentence for each path that cannot be read."""
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
    opened: Sequence[Source],
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Scans sources that were opened before. See `scan`."""
    total = sum(file_size(file) for source in opened for file in _by_file(source.entries))
    report = progress or (lambda done, of: None)
    reports = []
    for source in opened:
        found = _scan(source, dtype, threads, lambda done: report(done, total))
        label = source.root.name if len(opened) == 1 else str(source.root)
        reports.append(replace(found, findings=tuple(_with_place(one, source.root, label) for one in found.findings)))
    return merge(reports)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the floating-point dtype with a name; None for None.

    Raises:
        InvalidInput: If no floating-point dtype has that name.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInput(f"expected a floating-point dtype such as float16 or bfloat16, got {dtype}")
    return found


def _configured_dtype(source: Source) -> torch.dtype | None:
    """The dtype in the configuration of a model or checkpoint; None if it names no floating-point dtype."""
    try:
        return as_dtype(source.metadata.get("dtype"))
    except (InvalidInput, AttributeError):
        return None


def _scan(
    source: Source, dtype: torch.dtype | None, threads: int | None, progress: Callable[[int], object]
) -> PreflightReport:
    """Scans a file or a tree; each folder of a tree is judged by itself."""
    findings = list(source.findings)
    files: list[ScannedFile] = []
    for folder in folders(source):
        read, damage = _read(folder, threads, progress)
        findings += [*damage, *judge(read, dtype or _configured_dtype(folder)), *state_rules.check(folder, read)]
        findings += [*scale_rules.check(folder, read), *statistics_rules.check(read)]
        files += read
    unchecked, not_read = source.unchecked, source.not_read
    if not_read and not source.entries:  # nothing but what is not read
        unchecked, not_read = (*unchecked, *(f"{name}: this format is not read" for name in not_read)), ()
    return PreflightReport(by_severity(findings), (_summary(source, files),), unchecked, not_read)


def folders(source: Source) -> tuple[Source, ...]:
    """Returns the folders of a tree, each a model or checkpoint of its own; any other source as it is."""
    return source.parts if any(part.parts for part in source.parts) else (source,)


def _read(
    source: Source, threads: int | None, progress: Callable[[int], object]
) -> tuple[list[ScannedFile], list[Finding]]:
    files: list[ScannedFile] = []
    findings: list[Finding] = []
    checksums: dict[Path, list[Checksum]] = {}
    for checksum in source.checksums:
        checksums.setdefault(checksum.file, []).append(checksum)
    for file, entries in _by_file(source.entries).items():
        stored = checksums.get(file, ())
        try:
            files.append(read_file(file, entries, (), checksums=stored, threads=threads, progress=progress))
        except DamagedFile as error:
            findings.append(error.finding(file))
    return files, findings


def _with_place(finding: Finding, root: Path, label: str) -> Finding:
    """The finding with the place of its file below the given path, where the message has only the file's name."""
    file = Path(finding.file)
    try:
        place = file.relative_to(root)
    except ValueError:
        return finding
    shown = label if place == Path() else str(place) if label == root.name else f"{label}/{place}"
    message = finding.message
    if message.startswith(file.name):
        return replace(finding, message=shown + message[len(file.name) :])
    is_plain = label == root.name and (place == Path() or (shown == file.name and not file.is_dir()))
    return finding if is_plain else replace(finding, message=f"{shown}: {message}")


def _by_file(entries: Iterable[TensorEntry]) -> dict[Path, list[TensorEntry]]:
    files: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        files.setdefault(entry.file, []).append(entry)
    return files


def _summary(source: Source, files: Sequence[ScannedFile]) -> str:
    has_record = [tensor.record is not None for file in files for tensor in file.tensors]
    nbytes = sum(file.nbytes for file in files)
    integers = (
        f", and {has_record.count(False)} of integers, whose values can be anything" if False in has_record else ""
    )
    return (
        f"{source.root} ({source.layout}): {has_record.count(True)} tensors of floats{integers}, "
        f"in {len(files)} files of {nbytes / 1e6:,.1f} MB"
    )
