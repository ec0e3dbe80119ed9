"""The files below a folder that a manifest lists, without ever leaving that folder."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding
from hallo_numguard.files.manifest.file_names import in_order, is_left_over, is_listed

_REMEDIES = {
    "bad_link": "Put the file itself in its place, or delete the link.",
    "link_outside": "Put the file itself in its place, or delete the link.",
    "special_file": "Delete it.",
    "left_over": "Delete it.",
}
_LONGEST = 4096  # characters of a path: no system takes more


@dataclass(frozen=True)
class Tree:
    """What lies in a folder.

    Attributes:
        files: Where each file is, by its name: the path relative to the folder, with `/`. In pathlib's order.
        linked: Names of those that are reached through a link.
        findings: What is no file that could be listed: links that lead out, pipes, names that differ in case only.
    """

    files: Mapping[str, Path]
    linked: frozenset[str]
    findings: tuple[Finding, ...]

    def without(self, name: str) -> dict[str, Path]:
        """Returns all files but this one."""
        return {other: path for other, path in self.files.items() if other != name}


def walk(root: Path, also: Iterable[str] = ()) -> Tree:
    """Returns what lies in `root`: all that a manifest of ours lists, and files with the names in `also`.

    Links to files are followed inside of `root`, and from a snapshot of the Hugging Face cache to its blobs; links to
    folders never are.

    Raises:
        InvalidInput: If it is no folder, or one in it cannot be listed.
    """
    files: dict[str, Path] = {}
    linked: list[str] = []
    findings: list[Finding] = []
    for name, entry in _entries(root, _with_folders(also)):
        problem = _problem(root, entry)
        if problem is not None:
            kind, message, severity = problem
            findings.append(Finding(kind, f"{name} {message}", file=name, severity=severity, remedy=_REMEDIES[kind]))
            continue
        files[name] = Path(entry.path)
        if entry.is_symlink():
            linked.append(name)
    ordered = {name: files[name] for name in sorted(files, key=in_order)}
    return Tree(ordered, frozenset(linked), (*findings, *_same_but_for_case(list(ordered))))


def blobs_of(root: Path) -> Path | None:
    """Returns the folder that holds the files of `root` if that is a snapshot of the Hugging Face cache, else None."""
    real = Path(os.path.realpath(root))
    return real.parent.parent / "blobs" if real.parent.name == "snapshots" else None


def _with_folders(names: Iterable[str]) -> set[str]:
    """The names of files, and of the folders that they are in."""
    possible = (name for name in names if len(name) <= _LONGEST)
    return {part for name in possible for part in accumulate(name.split("/"), "{}/{}".format)}


def _entries(root: Path, also: Set[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    folders = [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in _listed(folder):
            name = prefix + entry.name
            if not is_listed(name) and name not in also:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append((Path(entry.path), f"{name}/"))
            else:
                yield name, entry


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be listed: {error.strerror}") from error


def _problem(root: Path, entry: os.DirEntry[str]) -> tuple[str, str, str] | None:
    """Why an entry cannot be listed, as kind, message and severity; None if it can."""
    if entry.is_symlink():
        return _problem_of_link(root, entry.path)
    if not entry.is_file(follow_symlinks=False):
        return "special_file", "is neither a file nor a folder; it was not opened", "error"
    if is_left_over(entry.name):
        return "left_over", "was left when a manifest was being written and the process ended", "info"
    return None


def _problem_of_link(root: Path, link: str) -> tuple[str, str, str] | None:
    target = Path(os.path.realpath(link))
    if not target.is_file():
        return "bad_link", f"is a link to {_pointed(link)}, which is no file", "error"
    inside = target.is_relative_to(os.path.realpath(root))
    if not inside and target.parent != blobs_of(root):
        return "link_outside", f"is a link that leads out of the folder, to {_pointed(link)}", "error"
    return None


def _pointed(link: str) -> str:
    return str(Path(link).readlink())


def _same_but_for_case(names: list[str]) -> Iterator[Finding]:
    """Findings about files that would be one on a file system that ignores case (macOS, Windows)."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            message = f"{name} and {other} differ in case only: where case is ignored, one replaces the other"
            yield Finding("same_but_for_case", message, file=name, severity="error", remedy="Rename one of the two.")
