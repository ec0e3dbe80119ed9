"""Opening what others have written: regular files inside the folder that was named, and nothing else."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hallo_numguard.files.formats.source import DamagedFile

_LONGEST_TAG = 1024  # bytes
_HUB_BLOBS = "blobs"
_HUB_SNAPSHOTS = "snapshots"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Opens a regular file for reading and gives its descriptor.

    Raises:
        DamagedFile: If it is something else (a pipe or a device would never end), or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DamagedFile(
            f"cannot be opened: {error.strerror}", remedy="Check that it is there and readable."
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedFile("is no regular file", remedy="Put the file itself in its place.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Returns so many bytes of a file.

    Raises:
        DamagedFile: If it ends before.
    """
    try:
        data = os.pread(descriptor, nbytes, offset)
    except (OSError, OverflowError) as error:
        raise DamagedFile(f"cannot be read at byte {offset}: {error}") from None
    if len(data) != nbytes:
        raise DamagedFile(f"is cut off: it ends {nbytes - len(data)} bytes too early")
    return data


class Window(io.RawIOBase):
    """A part of an open file, as a file of its own.

    Args:
        descriptor: Of the file; it is not closed with the window.
        begin, nbytes: Of the part.
    """

    def __init__(self, descriptor: int, begin: int, nbytes: int) -> None:
        self.descriptor = descriptor
        self.begin = begin
        self.nbytes = nbytes
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As every file's."""
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.nbytes}[whence]
        if at < 0:
            raise ValueError("a place before the beginning")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        """As every file's."""
        left = max(0, self.nbytes - self._at)
        data = os.pread(self.descriptor, left if size < 0 else min(size, left), self.begin + self._at)
        self._at += len(data)
        return data


def is_plain(name: str) -> bool:
    """Returns whether a name, taken from a file, is that of something in the same folder."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def check_inside(path: Path, root: Path) -> None:
    """Checks that a file lies in a folder, symbolic links resolved.

    The cache of the Hugging Face Hub links from `snapshots/REVISION` to `blobs` beside it, which is allowed.

    Raises:
        DamagedFile: If it leads elsewhere.
    """
    try:
        real, folder = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise DamagedFile("is a link that leads nowhere", remedy="Put the file itself in its place.") from None
    if real.is_relative_to(folder):
        return
    if folder.parent.name == _HUB_SNAPSHOTS and real.parent == folder.parent.parent / _HUB_BLOBS:
        return
    raise DamagedFile(
        f"leads out of the folder {root.name}, to {real}",
        kind="escape",
        remedy="Do not load from this folder unless you know who made the link; put the file itself in its place.",
    )


def tag_in(latest: Path) -> str:
    """Returns the name of a checkpoint that a file such as `latest` holds.

    Raises:
        DamagedFile: If it is no name of something in the same folder.
    """
    remedy = "Write the name of the newest whole checkpoint into it."
    with opened(latest) as descriptor:
        tag = os.pread(descriptor, _LONGEST_TAG, 0).decode("utf-8", "replace").strip()
    if not tag:
        raise DamagedFile("is empty", kind="missing", remedy=remedy)
    if not is_plain(tag):
        raise DamagedFile(f"leads out of the folder: {tag}", kind="escape", remedy=remedy)
    return tag
