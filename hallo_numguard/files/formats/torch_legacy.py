"""Files of torch.save before 1.6: five pickles, followed by the bytes of each storage."""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path

from hallo_numguard.files.formats.file_access import first_bytes, opened, read_exactly
from hallo_numguard.files.formats.pickles import StoredBytes, Unpickled, unpickle
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged
from hallo_numguard.files.formats.torch_zip import Archive, named_tensors, source_of

LAYOUT = "torch legacy"
_MAX_PICKLE_BYTES = 64 << 20
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number 0x1950a86a20f9469cfc6c, pickled
_MAGIC_WITHIN = 32  # bytes
_NUMEL = struct.Struct("<q")
_PICKLES = ("magic number", "protocol", "system", "value", "keys")


def recognises(path: Path) -> bool:
    """Returns whether the file begins with the magic number."""
    return _MAGIC in first_bytes(path, _MAGIC_WITHIN)


def read(path: Path) -> Source:
    """Returns where the tensors lie. The format has no checksums."""
    try:
        return source_of(_open(path), LAYOUT)
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def _open(path: Path) -> Archive:
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        stream = io.BytesIO(read_exactly(descriptor, min(size, _MAX_PICKLE_BYTES), 0))
        *_, value, keys = (_next_pickle(stream) for _ in _PICKLES)
        records = dict(_records(descriptor, size, stream.tell(), value, keys))
    return Archive(path, value, records, (), value.code_findings(path))


def _next_pickle(stream: io.BytesIO) -> Unpickled:
    begin = stream.tell()
    try:
        for _ in pickletools.genops(stream):
            pass
    except Exception as error:  # noqa: BLE001 - hostile opcodes raise anything at all in the standard library
        raise DamagedFile(f"holds a damaged pickle ({type(error).__name__})") from None
    return unpickle(stream.getvalue()[begin : stream.tell()])


def _records(
    descriptor: int, size: int, position: int, value: Unpickled, keys: Unpickled
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Offset and size of each storage by key: they follow in the order of the keys, each behind its element count."""
    storages: dict[str, StoredBytes] = {}
    for _, tensor in named_tensors(value.value):
        storages[tensor.storage.key] = tensor.storage
    for key in keys.value if isinstance(keys.value, list) else ():
        if not isinstance(key, str) or key not in storages:
            raise DamagedFile("holds a storage that no tensor refers to")
        (numel,) = _NUMEL.unpack(read_exactly(descriptor, _NUMEL.size, position))
        nbytes = numel * storages[key].dtype.itemsize
        position += _NUMEL.size
        if numel != storages[key].numel or position + nbytes > size:
            raise DamagedFile(f"is cut off or damaged: storage {key} is not where it should be")
        yield key, (position, nbytes)
        position += nbytes
