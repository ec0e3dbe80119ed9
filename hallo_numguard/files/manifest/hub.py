"""What the Hugging Face cache knows of files that were downloaded: the digests that the Hub gave with them.

The Hub's etag is the sha256 of a file that lies in large file storage, and git's sha1 of any other, which is small.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.manifest.file_names import DOWNLOADS
from hallo_numguard.files.manifest.tree import blobs_of

_SHA256 = 64  # digits
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_LONGEST = 4096  # bytes of such a file: commit, etag and time, a line each


def etags(root: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the etag of each of `files`, by name, where the cache has one."""
    found = {}
    for name, path in files.items():
        etag = _of_blob(root, path) or _of_download(root, name)
        if _ETAG.fullmatch(etag):
            found[name] = etag
    return found


def needs_sha256(etag: str) -> bool:
    """Whether an etag is a sha256."""
    return len(etag) == _SHA256


def unlike_hub(
    etags: Mapping[str, str], files: Mapping[str, Path], sha256: Mapping[str, str], as_listed: Set[str]
) -> Iterator[Finding]:
    """Yields a finding for each file that is not what was downloaded.

    Args:
        etags: By name.
        files: By name.
        sha256: Of the files, by name.
        as_listed: Names of those that are as a manifest says: who altered these meant it.
    """
    for name, etag in etags.items():
        found = sha256.get(name) if needs_sha256(etag) else _git_digest(files[name])
        if found and found != etag:
            message = f"{name} is not what the Hub gave: its digest should be {etag}, got {found}"
            severity = "info" if name in as_listed else "error"
            yield Finding("unlike_hub", message, severity=severity, file=name, remedy="Download it again.")


def _of_blob(root: Path, path: Path) -> str:
    """The name of the blob that a snapshot's file is a link to: that is its etag."""
    target = Path(os.path.realpath(path))
    return target.name if path.is_symlink() and target.parent == blobs_of(root) else ""


def _of_download(root: Path, name: str) -> str:
    """The etag that a download into a folder has left beside it."""
    metadata = root / DOWNLOADS / "download" / f"{name}.metadata"
    try:
        if not metadata.is_file():
            return ""
        with metadata.open("rb") as file:
            lines = file.read(_LONGEST).decode().splitlines()
    except (OSError, ValueError):
        return ""
    return lines[1].strip() if len(lines) > 1 else ""


def _git_digest(path: Path) -> str:
    """The sha1 that git gives a file; "" if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
