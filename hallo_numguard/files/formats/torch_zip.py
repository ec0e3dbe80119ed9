"""Files of torch.save: a zip archive with a pickle and one uncompressed record per storage."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import Window, first_bytes, opened, read_exactly
from hallo_numguard.files.formats.pickles import StoredTensor, Unpickled, plain, unpickle
from hallo_numguard.files.formats.source import (
    Checksum,
    DamagedFile,
    Source,
    TensorEntry,
    damaged,
    role_of,
    row_major,
)

LAYOUT = "torch"
_SUFFIXES = (".pt", ".pth", ".ckpt")
_ZIP = b"PK\x03\x04"
_FIRST_RECORD_WITHIN = 512  # bytes
_PICKLE = b"\x80"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_RECORDS = 2_000_000
_MAX_PICKLE_BYTES = 64 << 20
_MAX_NESTING = 50  # containers around a tensor
_PICKLE_REMEDY = "Load it where it is trusted and save it again with a current torch, or better as safetensors."


@dataclass
class Archive:
    """A file of torch.save.

    Attributes:
        path: The file.
        unpickled: Content of its pickle.
        records: Offset and size in bytes of each storage, by key.
        checksums: CRC-32 of its records, unless they were not computed when the file was written.
        findings: Damage found so far.
    """

    path: Path
    unpickled: Unpickled
    records: Mapping[str, tuple[int, int]]
    checksums: tuple[Checksum, ...]
    findings: list[Finding] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """The object in the pickle."""
        return self.unpickled.value

    def entry(self, name: str, role: str, tensor: StoredTensor, **more: Any) -> TensorEntry:
        """Returns where a tensor lies; `more` are further fields of the entry.

        Raises:
            DamagedFile: If some of its bytes are missing.
        """
        key = tensor.storage.key
        if key not in self.records:
            raise DamagedFile(f"lacks the data of {name} (record {key})")
        offset, nbytes = self.records[key]
        size = tensor.dtype.itemsize
        begin, length = tensor.offset * size, _extent(tensor) * size
        if begin + length > nbytes:
            raise DamagedFile(f"holds {nbytes} bytes for {name}, which needs {begin + length}")
        stride = None if tensor.stride == row_major(tensor.shape) or length == 0 else tensor.stride
        return TensorEntry(name, role, tensor.dtype, tensor.shape, self.path, offset + begin, length, stride, **more)

    def source(self, layout: str, entries: list[TensorEntry], metadata: Mapping[str, Any]) -> Source:
        """Returns the archive as a source with these tensors."""
        found = tuple(self.findings)
        return Source(layout, self.path, (self.path,), entries, found, (), metadata, self.checksums)


def recognises(path: Path) -> bool:
    """Returns whether this is a file of torch.save, by its name or its first record: many files are called .bin."""
    if path.suffix in _SUFFIXES or (path.suffix == ".bin" and "model" in path.name):
        return True
    beginning = first_bytes(path, _FIRST_RECORD_WITHIN)
    return beginning.startswith(_ZIP) and b"data.pkl" in beginning


def read(path: Path) -> Source:
    """Returns where the tensors lie. Their names are the keys of nested dictionaries, joined by dots."""
    try:
        return source_of(open_archive(path), LAYOUT)
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def source_of(archive: Archive, layout: str) -> Source:
    """Returns all tensors of an archive, with the plain values at the top level as metadata."""
    entries = []
    for name, tensor in named_tensors(archive.value):
        try:
            entries.append(archive.entry(name, role_of(name), tensor))
        except DamagedFile as error:
            archive.findings.append(error.finding(archive.path))
    return archive.source(layout, entries, _metadata(archive.value))


def open_archive(path: Path, begin: int = 0, nbytes: int | None = None) -> Archive:
    """Reads the zip directory and the pickle.

    Args:
        path: File with the archive.
        begin: Position at which the archive begins.
        nbytes: Size of the archive (default: up to the end of the file).

    Raises:
        DamagedFile: If there is no complete archive with a pickle in it.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        window = Window(descriptor, begin, size - begin if nbytes is None else nbytes)
        if begin + window.nbytes > size:
            raise DamagedFile(f"is cut off: it has {size} bytes, and {begin + window.nbytes} are needed")
        _check_beginning(window)
        members = _members(window)
        prefix = _prefix(members)
        places = {member.filename: _place(window, member) for member in members}
        offset, length = places[f"{prefix}data.pkl"]
        if length > _MAX_PICKLE_BYTES:
            raise DamagedFile(f"holds a pickle of {length} bytes")
        unpickled = unpickle(read_exactly(descriptor, length, offset))
    data = f"{prefix}data/"
    records = {name[len(data) :]: place for name, place in places.items() if name.startswith(data)}
    checksums = tuple(
        Checksum(path, member.filename, *places[member.filename], member.CRC) for member in members if member.CRC
    )
    return Archive(path, unpickled, records, checksums, unpickled.code_findings(path))


def named_tensors(value: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yields every tensor in nested containers, with the keys that lead to it joined by dots."""
    stack = [("", value, 0)]
    seen: set[int] = set()
    while stack:
        name, item, depth = stack.pop()
        if isinstance(item, StoredTensor):
            yield name, item
        if not isinstance(item, (Mapping, list, tuple)) or isinstance(item, StoredTensor):
            continue
        if id(item) in seen or depth > _MAX_NESTING:
            continue
        seen.add(id(item))
        pairs = list(item.items()) if isinstance(item, Mapping) else list(enumerate(item))
        stack.extend((f"{name}.{key}" if name else str(key), child, depth + 1) for key, child in reversed(pairs))


def _metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    scalar = (str, int, float, bool)
    return {key: plain(item) for key, item in value.items() if isinstance(key, str) and isinstance(item, scalar)}


def _extent(tensor: StoredTensor) -> int:
    """Number of elements from the first to the last in memory, gaps included."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))


def _check_beginning(window: Window) -> None:
    beginning = window.read(32)
    if not beginning:
        raise DamagedFile("is empty (0 bytes)")
    if beginning.startswith(_ZIP):
        return
    if beginning.startswith(_PICKLE):
        raise DamagedFile("is a bare pickle, not an archive of torch.save", kind="bare_pickle", remedy=_PICKLE_REMEDY)
    zeros = " (it begins with zeros)" if not any(beginning) else ""
    raise DamagedFile(
        f"is no archive of torch.save{zeros}: its beginning was overwritten, or it is another kind of file"
    )


def _members(window: Window) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(window) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise DamagedFile(f"is cut off or damaged: the directory at its end cannot be read ({error})") from None
    if len(members) > _MAX_RECORDS or len({member.filename for member in members}) != len(members):
        raise DamagedFile("has a directory that names a record twice, or far too many records")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise DamagedFile(
            "is a TorchScript archive, which is a program", kind="torchscript", remedy="Save its state_dict instead."
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise DamagedFile(
            "holds compressed records, which torch.save never writes", kind="zip_bomb", remedy="Do not unpack it."
        )
    if sum(member.file_size for member in members) > window.nbytes:
        raise DamagedFile(
            "has a directory whose records add up to more than the file", kind="zip_bomb", remedy="Do not unpack it."
        )
    return members


def _prefix(members: list[zipfile.ZipInfo]) -> str:
    """The name of the top folder inside the archive, with a slash."""
    names = [member.filename for member in members]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedFile("is a zip archive, but not of torch.save: it has no data.pkl")
    return pickles[0].removesuffix("data.pkl")


def _place(window: Window, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and size of a record: the directory gives the offset of its header, whose length varies."""
    header = read_exactly(window.descriptor, _LOCAL_HEADER.size, window.begin + member.header_offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != _ZIP or offset + member.file_size > window.nbytes:
        raise DamagedFile(f"is damaged: record {member.filename} is not where the directory says")
    return window.begin + offset, member.file_size
