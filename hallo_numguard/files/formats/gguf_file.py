"""GGUF files, of llama.cpp. Blocks of quantized weights are kept as bytes; the scales in them are read by a rule."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.files.formats.file_access import first_bytes, opened, read_exactly
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, damaged

LAYOUT = "gguf"
_MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 256 << 20
_MAX_COUNT = 1 << 22  # tensors, keys, or values of an array
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Number of a type: elements and bytes of a block, and the offsets of its float16 scales.
BLOCKS: dict[int, tuple[int, int, tuple[int, ...]]] = {
    2: (32, 18, (0,)),
    3: (32, 20, (0, 2)),
    6: (32, 22, (0,)),
    7: (32, 24, (0, 2)),
    8: (32, 34, (0,)),
    9: (32, 36, (0, 2)),
    10: (256, 84, (80, 82)),
    11: (256, 110, (108,)),
    12: (256, 144, (0, 2)),
    13: (256, 176, (0, 2)),
    14: (256, 210, (208,)),
    15: (256, 292, ()),
    16: (256, 66, (0,)),
    17: (256, 74, (0,)),
    18: (256, 98, (0,)),
    19: (256, 50, (0,)),
    20: (32, 18, (0,)),
    21: (256, 110, (0,)),
    22: (256, 82, (0,)),
    23: (256, 136, (0,)),
    29: (256, 56, ()),
    34: (256, 54, (52,)),
    35: (256, 66, (64,)),
    39: (32, 17, ()),
}


def recognises(path: Path) -> bool:
    """Returns whether the file begins as GGUF does, or is named so."""
    return first_bytes(path, 4) == _MAGIC or (path.suffix == ".gguf" and not path.is_dir())


def read(path: Path) -> Source:
    """Returns where the tensors lie."""
    try:
        with opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            header = _Header(io.BytesIO(read_exactly(descriptor, min(size, _MAX_HEADER_BYTES), 0)))
            entries = list(_entries(path, header, size))
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)
    except (struct.error, OverflowError, MemoryError, RecursionError):
        return damaged(LAYOUT, path, DamagedFile("is cut off or damaged: its header ends too early"))
    known = [entry for entry in entries if isinstance(entry, TensorEntry)]
    unknown = sorted({entry for entry in entries if isinstance(entry, str)})
    return Source(LAYOUT, path, (path,), known, unchecked=tuple(f"{path.name}: {reason}" for reason in unknown))


class _Header:
    """Reads numbers, strings and tensors' places from the beginning of a file."""

    def __init__(self, stream: io.BytesIO) -> None:
        self._stream = stream
        magic, version = stream.read(4), self.number("<I")
        if magic != _MAGIC:
            zeros = ": its beginning was overwritten with zeros" if magic == bytes(4) else ""
            raise DamagedFile(f"is no GGUF file{zeros}")
        if not 2 <= version <= 16:
            raise DamagedFile(f"says that it is of version {version} of GGUF")
        tensors, keys = self._count(), self._count()
        self.alignment = 32
        for _ in range(keys):
            key, value = self._text(), self._value(self.number("<I"))
            if key == b"general.alignment" and isinstance(value, int) and value > 0:
                self.alignment = value
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.end = stream.tell()

    def number(self, form: str) -> Any:
        """Returns the next number."""
        return struct.unpack(form, self._stream.read(struct.calcsize(form)))[0]

    def _count(self) -> int:
        count = int(self.number("<Q"))
        if count > _MAX_COUNT:
            raise DamagedFile(f"has a damaged header: it counts {count} items")
        return count

    def _text(self) -> bytes:
        return self._stream.read(self._count())

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self._count()
            if inner in _SCALARS:
                self._stream.seek(struct.calcsize(_SCALARS[inner]) * count, os.SEEK_CUR)
                return None
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise DamagedFile(f"has a damaged header: a value of type {kind}")
        return self.number(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text().decode("utf-8", "replace"), self.number("<I")
        if dimensions > 8:
            raise DamagedFile(f"has a damaged header: {name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")


def _entries(path: Path, header: _Header, size: int) -> Iterator[TensorEntry | str]:
    data = -(-header.end // header.alignment) * header.alignment
    for name, shape, kind, offset in header.tensors:
        numel = math.prod(shape)
        if kind in _FLOATS:
            dtype, held, nbytes = _FLOATS[kind], shape, numel * _FLOATS[kind].itemsize
        elif kind in BLOCKS:
            per_block, block, _ = BLOCKS[kind]
            nbytes = -(-numel // per_block) * block
            dtype, held = torch.uint8, (nbytes // block, block)
        else:
            yield f"tensors of type {kind}, which is not known here"
            continue
        if data + offset + nbytes > size:
            raise DamagedFile(f"is cut off: it has {size} bytes, and {name} needs {data + offset + nbytes}")
        role = "parameter" if kind in _FLOATS else f"blocks {kind}"
        yield TensorEntry(name, role, dtype, held, path, data + offset, nbytes)
