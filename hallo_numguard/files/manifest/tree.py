"""The files below a folder that a manifest lists, without ever leaving the folder, and the Hub's digests of them.

The Hub's etag is the sha256 of a file in large file storage, and git's sha1 of any other.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import hops, hub_stores
from hallo_numguard.files.manifest.listing import HUB_DOWNLOADS, is_leftover, is_listed, path_order

_REMEDIES = {
    "bad_link": "Download or copy the file that it should lead to.",
    "link_outside": "Copy the file itself into the folder, if it belongs to it.",
    "special_file": "Delete it.",
    "leftover": "Delete it.",
}
_MAX_PATH_LENGTH = 4096  # characters; no file system takes more
_MAX_METADATA_BYTES = 4096  # commit, etag and time, one per line
_SHA256_DIGITS = 64
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True)
class Tree:
    """The files below a folder.

    Attributes:
        files: Path of each file by its name, the path relative to the folder with `/`, in the order of pathlib.
        linked: Names of files that are reached through a link.
        findings: Entries that cannot be listed: links that lead outside, pipes, names that differ in case only.
    """

    files: Mapping[str, Path]
    linked: frozenset[str]
    findings: tuple[Finding, ...]


def walk(root: Path, also: Iterable[str] = ()) -> Tree:
    """Returns the files below `root` that our manifests list.

    Links to files are followed inside of `root`, and from the Hugging Face cache into its stores; links to folders are
    not.

    Args:
        root: The folder.
        also: Names of further files to include.

    Raises:
        InvalidInput: If `root` is no folder, or a folder in it cannot be read.
    """
    files: dict[str, Path] = {}
    linked: list[str] = []
    findings: list[Finding] = []
    for name, entry in _entries(root, _with_parents(also)):
        problem = _problem(root, entry)
        if problem is not None:
            kind, message, severity = problem
            findings.append(Finding(kind, f"{name} {message}", file=name, severity=severity, remedy=_REMEDIES[kind]))
            continue
        files[name] = Path(entry.path)
        if entry.is_symlink():
            linked.append(name)
    ordered = {name: files[name] for name in sorted(files, key=path_order)}
    return Tree(ordered, frozenset(linked), (*findings, *_case_conflicts(list(ordered))))


def hub_etags(root: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the Hub's etag of each file, by name, where the Hugging Face cache keeps one."""
    etags = {name: _blob_name(root, path) or _download_etag(root, name) for name, path in files.items()}
    return {name: etag for name, etag in etags.items() if _ETAG.fullmatch(etag)}


def is_sha256(etag: str) -> bool:
    """Returns whether an etag is a sha256."""
    return len(etag) == _SHA256_DIGITS


def hub_mismatches(
    etags: Mapping[str, str], files: Mapping[str, Path], sha256: Mapping[str, str], unchanged: Set[str]
) -> Iterator[Finding]:
    """Yields a finding for each file that differs from what the Hub provided.

    Args:
        etags: Etag of each file, by name.
        files: Path of each file, by name.
        sha256: Digest of each file, by name.
        unchanged: Files that agree with a manifest: their difference is intended.
    """
    for name, etag in etags.items():
        digest = sha256.get(name) if is_sha256(etag) else _git_digest(files[name])
        if digest and digest != etag:
            message = f"{name} differs from the file on the Hub: its digest should be {etag}, got {digest}"
            severity = "info" if name in unchanged else "error"
            yield Finding("hub_mismatch", message, severity=severity, file=name, remedy="Download it again.")


def _with_parents(names: Iterable[str]) -> set[str]:
    """The names of files, and of the folders around them."""
    possible = (name for name in names if len(name) <= _MAX_PATH_LENGTH)
    return {part for name in possible for part in accumulate(name.split("/"), "{}/{}".format)}


def _entries(root: Path, also: Set[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    folders = [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in _directory(folder):
            name = prefix + entry.name
            if not is_listed(name) and name not in also:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append((Path(entry.path), f"{name}/"))
            else:
                yield name, entry


def _directory(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be listed: {error.strerror}") from error


def _problem(root: Path, entry: os.DirEntry[str]) -> tuple[str, str, str] | None:
    """Why an entry cannot be listed, as kind, message and severity; None if it can."""
    if entry.is_symlink():
        return _link_problem(root, entry.path)
    if not entry.is_file(follow_symlinks=False):
        return "special_file", "is neither a file nor a folder; it was not opened", "error"
    if is_leftover(entry.name):
        return "leftover", "is an unfinished part of a manifest, left by a process that ended", "info"
    return None


def _link_problem(root: Path, link: str) -> tuple[str, str, str] | None:
    target = Path(os.path.realpath(link))
    if not target.is_file():
        return "bad_link", f"is a link to {Path(link).readlink()}, which is no file", "error"
    if not any(target.is_relative_to(top) for top in (Path(os.path.realpath(root)), *hub_stores(root))):
        return "link_outside", f"is a link that leads out of the folder, to {Path(link).readlink()}", "error"
    return None


def _case_conflicts(names: list[str]) -> Iterator[Finding]:
    """Files that would be one on a file system that ignores case (macOS, Windows)."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            message = f"{name} and {other} differ in case only: where case is ignored, one replaces the other"
            yield Finding("same_but_for_case", message, file=name, severity="error", remedy="Rename one of the two.")


def _blob_name(root: Path, path: Path) -> str:
    """The name of the blob that a file of a snapshot links to, which is its etag; "" for other files."""
    stores = hub_stores(root)[:1]
    return next((hop.name for hop in hops(path) if hop.parent in stores), "")


def _download_etag(root: Path, name: str) -> str:
    """The etag that a download into a folder leaves beside the file; "" if there is none."""
    metadata = root / HUB_DOWNLOADS / "download" / f"{name}.metadata"
    try:
        if not metadata.is_file():
            return ""
        with metadata.open("rb") as file:
            lines = file.read(_MAX_METADATA_BYTES).decode().splitlines()
    except (OSError, ValueError):
        return ""
    return lines[1].strip() if len(lines) > 1 else ""


def _git_digest(path: Path) -> str:
    """Git's sha1 of a file; "" if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
