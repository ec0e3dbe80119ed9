"""Files that torch.save wrote before 1.6: five pickles, then the bytes of one storage after the other."""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path

from hallo_numguard.files.formats.file_access import opened, read_exactly
from hallo_numguard.files.formats.pickles import StoredBytes, Unpickled, refusal, unpickle
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged
from hallo_numguard.files.formats.torch_zip import Archive, named_tensors, source_of

LAYOUT = "torch legacy"
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number 0x1950a86a20f9469cfc6c, pickled
_GLANCE = 32
_LONGEST_PICKLES = 64 << 20  # bytes
_COUNT = struct.Struct("<q")
_PARTS = ("magic number", "protocol", "system", "value", "keys")


def recognises(path: Path) -> bool:
    """Returns whether it begins with the magic number."""
    try:
        with opened(path) as descriptor:
            return _MAGIC in os.pread(descriptor, _GLANCE, 0)
    except (DamagedFile, OSError):
        return False


def read(path: Path) -> Source:
    """Returns where the tensors lie. The format holds no checksums."""
    try:
        return source_of(_open(path), LAYOUT)
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def _open(path: Path) -> Archive:
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        stream = io.BytesIO(read_exactly(descriptor, min(size, _LONGEST_PICKLES), 0))
        *_, value, keys = (_next_pickle(stream) for _ in _PARTS)
        records = dict(_records(descriptor, size, stream.tell(), value, keys))
    refusals = filter(None, map(refusal, sorted(value.foreign)))
    return Archive(path, value, records, (), [error.finding(path) for error in refusals])


def _next_pickle(stream: io.BytesIO) -> Unpickled:
    begin = stream.tell()
    try:
        for _ in pickletools.genops(stream):
            pass
    except Exception as error:  # noqa: BLE001 - hostile opcodes raise anything at all in the standard library
        raise DamagedFile(f"holds a pickle that is damaged ({type(error).__name__})") from None
    return unpickle(stream.getvalue()[begin : stream.tell()])


def _records(
    descriptor: int, size: int, at: int, value: Unpickled, keys: Unpickled
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where the storages lie: each behind its number of elements, in the order of the keys."""
    storages: dict[str, StoredBytes] = {}
    for _, tensor in named_tensors(value.value):
        storages[tensor.storage.key] = tensor.storage
    for key in keys.value if isinstance(keys.value, list) else ():
        if not isinstance(key, str) or key not in storages:
            raise DamagedFile("holds a storage that no tensor refers to")
        (numel,) = _COUNT.unpack(read_exactly(descriptor, _COUNT.size, at))
        nbytes = numel * storages[key].dtype.itemsize
        at += _COUNT.size
        if numel != storages[key].numel or at + nbytes > size:
            raise DamagedFile(f"is cut off or damaged: the storage {key} does not lie where it should")
        yield key, (at, nbytes)
        at += nbytes
