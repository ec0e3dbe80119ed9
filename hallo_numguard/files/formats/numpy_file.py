"""Arrays of numpy: `.npy`, and `.npz`, a zip archive of them."""

from __future__ import annotations

import ast
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.files.formats.file_access import Window, first_bytes, opened, read_exactly
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, damaged

LAYOUT = "numpy"
_MAGIC = b"\x93NUMPY"
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_HEADER_BYTES = 1 << 16
_MAX_ARRAYS = 1_000_000
_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
}


def recognises(path: Path) -> bool:
    """Returns whether this is an array, or an archive of arrays."""
    beginning = first_bytes(path, 256)
    is_archive = beginning.startswith(_ZIP) and (path.suffix == ".npz" or b".npy" in beginning[30:])
    return beginning.startswith(_MAGIC) or is_archive or (path.suffix in (".npy", ".npz") and not path.is_dir())


def read(path: Path) -> Source:
    """Returns where the arrays lie."""
    try:
        with opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if read_exactly(descriptor, min(len(_MAGIC), size), 0) == _MAGIC:
                return _source(path, [(path.stem, 0, size)], descriptor, [])
            return _source(path, *_members(descriptor, size))
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def _members(descriptor: int, size: int) -> tuple[list[tuple[str, int, int]], int, list[str]]:
    """Name, offset and size of each array in an archive, and the names of those that are compressed."""
    try:
        with zipfile.ZipFile(Window(descriptor, 0, size)) as archive:
            members = archive.infolist()[:_MAX_ARRAYS]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise DamagedFile(f"is cut off or damaged: the directory at its end cannot be read ({error})") from None
    places, compressed = [], []
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            compressed.append(member.filename)
            continue
        header = read_exactly(descriptor, _LOCAL_HEADER.size, member.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        places.append((member.filename.removesuffix(".npy"), offset, member.file_size))
    return places, descriptor, compressed


def _source(path: Path, places: list[tuple[str, int, int]], descriptor: int, compressed: list[str]) -> Source:
    entries, unchecked = [], []
    for name, offset, nbytes in places:
        entry = _entry(path, name, offset, nbytes, descriptor)
        if isinstance(entry, TensorEntry):
            entries.append(entry)
        else:
            unchecked.append(f"{path.name}: array {name}, {entry}")
    if compressed:
        unchecked.append(f"{path.name}: {len(compressed)} compressed arrays, such as {compressed[0]}")
    return Source(LAYOUT, path, (path,), entries, unchecked=tuple(unchecked))


def _entry(path: Path, name: str, offset: int, nbytes: int, descriptor: int) -> TensorEntry | str:
    """Where an array lies, or why it cannot be read."""
    start = read_exactly(descriptor, min(12, nbytes), offset)
    if not start.startswith(_MAGIC) or len(start) < 12:
        raise DamagedFile(f"holds {name}, which is no array")
    is_old = start[6] == 1
    length = struct.unpack_from("<H" if is_old else "<I", start, 8)[0]
    begin = 10 if is_old else 12
    if length > min(_MAX_HEADER_BYTES, nbytes):
        raise DamagedFile(f"holds {name}, whose header is damaged")
    try:
        header: dict[str, Any] = ast.literal_eval(read_exactly(descriptor, length, offset + begin).decode("latin1"))
        order, descr, shape = bool(header["fortran_order"]), header["descr"], tuple(map(int, header["shape"]))
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise DamagedFile(f"holds {name}, whose header is damaged") from None
    dtype = _DTYPES.get(descr[1:]) if isinstance(descr, str) and descr[:1] in "<|=" else None
    if dtype is None:
        return f"whose type is {descr!r}"
    numel = 1
    for size in shape:
        numel *= max(size, 0)
    data = numel * dtype.itemsize
    if begin + length + data > nbytes:
        raise DamagedFile(f"is cut off: {name} needs {data} bytes")
    strides = _column_major(shape) if order and len(shape) > 1 and numel else None
    return TensorEntry(name, "parameter", dtype, shape, path, offset + begin + length, data, strides)


def _column_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step *= size
    return tuple(strides)
