"""The directory of a zip archive as torch reads it: by the offset in its end record, names without regard to case.

Python's `zipfile` corrects that offset where something lies before the archive, so that a file can hold two directories
of which each library reads another one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hallo_numguard.files.formats.file_access import Window, read_exactly
from hallo_numguard.files.formats.source import DamagedFile

_LOCAL, _ENTRY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENTRY_HEADER = struct.Struct("<4s4xHH4xIIIHHHHHII")
_END_RECORD = struct.Struct("<4s4xHHIIH")
_END64_RECORD = struct.Struct("<4sQ12xQQQQ")
_LOCATOR_RECORD = struct.Struct("<4s4xQI")
_MAX_COMMENT = 0xFFFF
_MAX_RECORDS = 2_000_000
_MAX_DIRECTORY_BYTES = 512 << 20
_IS_ENCRYPTED = 1
_FULL = 0xFFFFFFFF  # the value is in the extra field


@dataclass(frozen=True)
class Member:
    """A record of an archive.

    Attributes:
        name: Name of the record.
        method: Compression; 0 for none.
        crc32: CRC-32 of its bytes; 0 if it was not computed.
        header: Position of its header in the archive.
        nbytes: Size of its bytes when unpacked.
    """

    name: str
    method: int
    crc32: int
    header: int
    nbytes: int


def members(window: Window) -> list[Member]:
    """Returns the records of an archive, in the order of its directory.

    Raises:
        DamagedFile: If there is no whole directory, or names in it are the same but for case.
    """
    begin, nbytes, count = _extent(window)
    if begin + nbytes > window.nbytes or nbytes > _MAX_DIRECTORY_BYTES or count > _MAX_RECORDS:
        raise _cut("is not where the end record says")
    data = read_exactly(window.descriptor, nbytes, window.begin + begin)
    found = list(_entries(data, count))
    if len({member.name.lower() for member in found}) != len(found):
        raise DamagedFile("has a directory that names a record twice: loaders differ in which one they take")
    return found


def place(window: Window, member: Member) -> tuple[int, int]:
    """Returns offset and size of a record in the file. The length of the header before it varies.

    Raises:
        DamagedFile: If it does not lie there.
    """
    header = read_exactly(window.descriptor, _LOCAL_HEADER.size, window.begin + member.header)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = member.header + _LOCAL_HEADER.size + name_length + extra_length
    if magic != _LOCAL or offset + member.nbytes > window.nbytes:
        raise DamagedFile(f"is damaged: record {member.name} is not where the directory says")
    return window.begin + offset, member.nbytes


def _extent(window: Window) -> tuple[int, int, int]:
    """Begin and size of the directory, and the number of records in it. It lies right before the end record."""
    tail_bytes = min(window.nbytes, _END_RECORD.size + _MAX_COMMENT)
    tail_begin = window.nbytes - tail_bytes
    tail = read_exactly(window.descriptor, tail_bytes, window.begin + tail_begin)
    at = tail.rfind(_END, 0, max(0, len(tail) - _END_RECORD.size) + len(_END))
    if at < 0:
        raise _cut("cannot be read (there is no end record)")
    _, _, count, nbytes, begin, comment = _END_RECORD.unpack_from(tail, at)
    if at + _END_RECORD.size + comment != len(tail):
        raise _cut("is followed by other bytes")
    end = tail_begin + at
    locator = at - _LOCATOR_RECORD.size
    if locator >= 0 and tail.startswith(_LOCATOR64, locator):
        _, where, _ = _LOCATOR_RECORD.unpack_from(tail, locator)
        if where + _END64_RECORD.size <= window.nbytes:
            record = read_exactly(window.descriptor, _END64_RECORD.size, window.begin + where)
            if record.startswith(_END64):
                _, own_bytes, _, count, nbytes, begin = _END64_RECORD.unpack(record)
                end = where if where + 12 + own_bytes == tail_begin + locator else -1
    if begin + nbytes != end:
        raise _cut("does not lie before its end record: loaders differ in which one they take")
    return begin, nbytes, count


def _entries(data: bytes, count: int) -> Iterator[Member]:
    position = 0
    for _ in range(count):
        if position + _ENTRY_HEADER.size > len(data):
            raise _cut("ends too early")
        magic, flags, method, crc32, packed, nbytes, name_length, extra_length, comment_length, _, _, _, header = (
            _ENTRY_HEADER.unpack_from(data, position)
        )
        begin = position + _ENTRY_HEADER.size
        name = data[begin : begin + name_length]
        extra = data[begin + name_length : begin + name_length + extra_length]
        if magic != _ENTRY or len(name) != name_length or len(extra) != extra_length or flags & _IS_ENCRYPTED:
            raise _cut("is damaged")
        if _FULL in (packed, nbytes, header):
            nbytes, header = _wide(extra, packed, nbytes, header)
        yield Member(name.decode("utf-8", "surrogateescape"), method, crc32, header, nbytes)
        position = begin + name_length + extra_length + comment_length


def _wide(extra: bytes, packed: int, nbytes: int, header: int) -> tuple[int, int]:
    """Size and position from the zip64 part of an extra field, which has those values that are full, in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4) if len(extra) >= 4 + length else ())
            wide = [next(numbers, 0) if value == _FULL else value for value in (nbytes, packed, header)]
            return wide[0], wide[2]
        extra = extra[4 + length :]
    return nbytes, header


def _cut(how: str) -> DamagedFile:
    return DamagedFile(f"is cut off or damaged: the directory at its end {how}")
