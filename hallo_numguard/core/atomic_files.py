"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash at any moment it holds either its old contents or all of `data`.

    Raises:
        OSError: If it cannot be written. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as file:  # with the permissions that any new file has
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def first_free(path: Path, suffix: str = "") -> Path:
    """Returns `path` and `suffix`, with a number between them if that exists."""
    return next(name for name in _numbered(path, suffix) if not name.exists())


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """Writes a folder of files so that after a crash at any moment it is there whole or not at all.

    Returns:
        Path of the folder: `path`, with a number added if that exists.

    Raises:
        OSError: If it cannot be written. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_whole(temporary / name, data)
        free = first_free(path)
        temporary.rename(free)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)
    return free


def _numbered(path: Path, suffix: str) -> Iterator[Path]:
    yield path.with_name(f"{path.name}{suffix}")
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}.{number}{suffix}")


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
