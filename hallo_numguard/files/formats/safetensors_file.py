"""Safetensors files. The safetensors library validates the header; only the offsets are taken from it here."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.files.formats.file_access import first_bytes, opened, read_exactly
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, damaged

LAYOUT = "safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the library's limit
_LENGTH_BYTES = 8  # size of the field with the header's length
_METADATA = "__metadata__"
_SUFFIXES = (".safetensors", ".sft")
_HEADER_BEGINNINGS = (b'{"', b"{}")
_OTHERS = {  # what else is found under the name, by its first bytes
    b"PK\x03\x04": "an archive, as of torch.save",
    b"\x80": "a pickle, as of an old torch.save",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def recognises(path: Path) -> bool:
    """Returns whether the path is a safetensors file, by its suffix or by the beginning of its header."""
    if path.is_dir():
        return False
    if path.suffix in _SUFFIXES:
        return True
    beginning = first_bytes(path, _LENGTH_BYTES + 2)
    return len(beginning) > _LENGTH_BYTES and beginning[5:8] == bytes(3) and beginning[8:] in _HEADER_BEGINNINGS


def read(path: Path) -> Source:
    """Returns where the tensors lie."""
    try:
        header, data = _header(path)
        _validate(path)
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)
    metadata = header.pop(_METADATA, None) or {}
    entries = [_entry(path, name, item, data) for name, item in header.items() if item["dtype"] in _DTYPES]
    entries.sort(key=lambda entry: entry.offset)
    unknown = sorted({item["dtype"] for item in header.values()} - _DTYPES.keys())
    unchecked = tuple(f"{path.name}: tensors of dtype {dtype}, which torch cannot load" for dtype in unknown)
    return Source(LAYOUT, path, (path,), entries, unchecked=unchecked, metadata=metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the position at which the data begins. Names the common kinds of damage in plain words."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise DamagedFile("is empty (0 bytes)")
        first = read_exactly(descriptor, _LENGTH_BYTES, 0)
        (length,) = struct.unpack("<Q", first)
        if length == 0:
            raise DamagedFile("has a header of 0 bytes: its beginning was overwritten, most likely with zeros")
        other = next((name for magic, name in _OTHERS.items() if length > size and first.startswith(magic)), None)
        if other is not None:
            raise DamagedFile(f"is {other}, not safetensors", remedy="Give it the right name, or convert it.")
        if length > min(size, _MAX_HEADER_BYTES):
            raise DamagedFile(
                f"says that its header takes {length} bytes, but it has {size}: it is cut off, or not safetensors"
            )
        text = read_exactly(descriptor, length, _LENGTH_BYTES)
    try:
        header = json.loads(text, object_pairs_hook=_without_repetitions)
        ends = [item["data_offsets"][1] for name, item in header.items() if name != _METADATA]
        end = _LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise DamagedFile("has a damaged header, or is not safetensors") from None
    if size < end:
        raise DamagedFile(f"is cut off: it has {size} bytes, and its tensors need {end}")
    return header, _LENGTH_BYTES + length


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise DamagedFile(f"has a header that names {names.most_common(1)[0][0]} twice")
    return found


def _validate(path: Path) -> None:
    """Lets the library check for overlaps, gaps, wrong sizes, repeated names and the like."""
    from safetensors import SafetensorError, safe_open

    try:
        with opened(path) as descriptor:
            try:
                str(path).encode()
                readable = str(path)
            except UnicodeEncodeError:  # the library takes names in UTF-8 only
                readable = f"/proc/self/fd/{descriptor}"
            with safe_open(readable, framework="pt"):
                pass
    except (SafetensorError, OSError, UnicodeError) as error:
        raise DamagedFile(f"is damaged: {error}") from None


def _entry(path: Path, name: str, item: dict[str, Any], data: int) -> TensorEntry:
    begin, end = item["data_offsets"]
    dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
    if dtype == torch.float4_e2m1fn_x2 and shape:  # the header counts values, torch pairs of them
        shape = (*shape[:-1], shape[-1] // 2)
    return TensorEntry(name, "parameter", dtype, shape, path, data + begin, end - begin)
