"""Opening what others have written: regular files inside the folder that was named, and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hallo_numguard.checkpoint.readers.source import DamagedFile

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
    data = os.pread(descriptor, nbytes, offset)
    if len(data) != nbytes:
        raise DamagedFile(f"is cut off: it ends {nbytes - len(data)} bytes too early")
    return data


def check_inside(path: Path, root: Path) -> None:
    """Checks that a file lies in a folder, symbolic links resolved.

    The cache of the Hugging Face Hub links from `snapshots/REVISION` to `blobs` beside it, which is allowed.

    Raises:
        DamagedFile: If it leads elsewhere.
    """
    real, folder = path.resolve(), root.resolve()
    if real.is_relative_to(folder):
        return
    if folder.parent.name == _HUB_SNAPSHOTS and real.parent == folder.parent.parent / _HUB_BLOBS:
        return
    raise DamagedFile(
        f"leads out of the folder {root.name}, to {real}",
        kind="escape",
        remedy="Do not load from this folder unless you know who made the link; put the file itself in its place.",
    )
