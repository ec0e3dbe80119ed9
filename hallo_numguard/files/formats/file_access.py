"""Opening untrusted files: regular files inside the given folder, and nothing else."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hallo_numguard.files.formats.source import DamagedFile

_MAX_TAG_BYTES = 1024
_MAX_HOPS = 40  # of links; Linux follows no more
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Opens a regular file for reading and yields its descriptor.

    Raises:
        DamagedFile: If it cannot be opened, or is no regular file: a pipe or a device could block forever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = "Check that the file exists and is readable."
        raise DamagedFile(f"cannot be opened: {error.strerror}", remedy=remedy) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedFile("is no regular file", remedy="Replace it by the file itself.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Returns `nbytes` bytes of a file from `offset` on.

    Raises:
        DamagedFile: If the file ends before that.
    """
    try:
        data = os.pread(descriptor, nbytes, offset)
    except (OSError, OverflowError) as error:
        raise DamagedFile(f"cannot be read at byte {offset}: {error}") from None
    if len(data) != nbytes:
        raise DamagedFile(f"is cut off: it ends {nbytes - len(data)} bytes too early")
    return data


def first_bytes(path: Path, nbytes: int) -> bytes:
    """Returns the beginning of a file; b"" if it cannot be read."""
    try:
        with opened(path) as descriptor:
            return os.pread(descriptor, nbytes, 0)
    except (DamagedFile, OSError):
        return b""


def read_small(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a small file, such as an index or configuration.

    Raises:
        DamagedFile: If it cannot be read, or is larger than `max_bytes`.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise DamagedFile(f"is far larger ({size} bytes) than any such file should be")
        return read_exactly(descriptor, size, 0)


class Window(io.RawIOBase):
    """Part of an open file, as a file object of its own.

    Args:
        descriptor: Descriptor of the file; closing the window leaves it open.
        begin: Position of the part's first byte.
        nbytes: Size of the part.
    """

    def __init__(self, descriptor: int, begin: int, nbytes: int) -> None:
        self.descriptor = descriptor
        self.begin = begin
        self.nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position and returns it."""
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.nbytes}[whence]
        if position < 0:
            raise ValueError("negative seek position")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        """Returns the next `size` bytes, or all that remain."""
        remaining = max(0, self.nbytes - self._position)
        data = os.pread(self.descriptor, remaining if size < 0 else min(size, remaining), self.begin + self._position)
        self._position += len(data)
        return data


def is_plain(name: str) -> bool:
    """Returns whether a name taken from a file is that of a direct child of the same folder."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def outside_links(files: Iterable[Path], root: Path) -> list[Path]:
    """Returns the files that are reached by links out of a folder, into no store of the Hugging Face cache."""
    folder = Path(os.path.realpath(root))
    trusted = (folder if folder.is_dir() else folder.parent, *hub_stores(root))
    return [file for file in files if not any(Path(os.path.realpath(file)).is_relative_to(top) for top in trusted)]


def hub_stores(path: Path) -> tuple[Path, ...]:
    """Returns the folders with the files behind a path in the Hugging Face cache: the repository's, and the shared one.

    The path may be the repository's folder, a snapshot, or anything in one. Empty for a path elsewhere.
    """
    real = Path(os.path.realpath(path))
    repository = next((folder for folder in (real, *real.parents) if _HUB_REPOSITORY.match(folder.name)), None)
    return () if repository is None else (repository / "blobs", repository.parent / "blobs")


def hops(link: Path) -> Iterator[Path]:
    """Yields the paths that a link leads through, one after the other, up to the file."""
    for _ in range(_MAX_HOPS):
        if not link.is_symlink():
            return
        link = Path(os.path.normpath(Path(os.path.realpath(link.parent)) / link.readlink()))
        yield link


def file_size(path: Path) -> int:
    """Returns the size of a file in bytes; 0 if it is unknown, which reading the file will report."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_tag(latest: Path) -> str:
    """Returns the checkpoint tag in a file such as `latest`.

    Raises:
        DamagedFile: If it is empty, or no name of a direct child of the same folder.
    """
    remedy = "Write the name of the newest complete checkpoint into it."
    with opened(latest) as descriptor:
        tag = os.pread(descriptor, _MAX_TAG_BYTES, 0).decode("utf-8", "replace").strip()
    if not tag:
        raise DamagedFile("is empty", kind="missing", remedy=remedy)
    if not is_plain(tag):
        raise DamagedFile(f"leads out of the folder: {tag}", kind="escape", remedy=remedy)
    return tag
