"""Files of torch.save: a zip archive of a pickle and of one stored record a storage."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import Window, opened, read_exactly
from hallo_numguard.files.formats.pickles import StoredTensor, Unpickled, inert, refusal, unpickle
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
_GLANCE = 512  # bytes in which the name of the first record stands
_PICKLE = b"\x80"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MOST_RECORDS = 2_000_000
_MOST_PICKLE = 64 << 20  # bytes
_MOST_DEPTH = 50
_PICKLE_REMEDY = "Load it where it is trusted and save it again with a torch of today, or better as safetensors."


@dataclass
class Archive:
    """A file of torch.save.

    Attributes:
        path: Of the file.
        unpickled: What its pickle holds.
        records: Where the bytes of each storage lie: offset and number, by key.
        checksums: CRC-32 of its records; those that were not computed are left out.
        findings: What is wrong with it.
    """

    path: Path
    unpickled: Unpickled
    records: Mapping[str, tuple[int, int]]
    checksums: tuple[Checksum, ...]
    findings: list[Finding] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """What the pickle holds."""
        return self.unpickled.value

    def entry(self, name: str, role: str, tensor: StoredTensor, **more: Any) -> TensorEntry:
        """Returns where a tensor lies.

        Raises:
            DamagedFile: If the archive does not hold all of its bytes.
        """
        key = tensor.storage.key
        if key not in self.records:
            raise DamagedFile(f"lacks the data of {name} (record {key})")
        offset, nbytes = self.records[key]
        size = tensor.dtype.itemsize
        begin, run = tensor.offset * size, _extent(tensor) * size
        if begin + run > nbytes:
            raise DamagedFile(f"holds {nbytes} bytes for {name}, which needs {begin + run}")
        stride = None if tensor.stride == row_major(tensor.shape) or run == 0 else tensor.stride
        return TensorEntry(name, role, tensor.dtype, tensor.shape, self.path, offset + begin, run, stride, **more)

    def source(self, layout: str, entries: list[TensorEntry], metadata: Mapping[str, Any]) -> Source:
        """Returns it as a source."""
        return Source(
            layout,
            self.path,
            (self.path,),
            entries,
            tuple(self.findings),
            metadata=metadata,
            checksums=self.checksums,
        )


def recognises(path: Path) -> bool:
    """Returns whether it is such a file: by its name, or by its first record. Many files are called .bin."""
    if path.suffix in _SUFFIXES or (path.suffix == ".bin" and "model" in path.name):
        return True
    try:
        with opened(path) as descriptor:
            beginning = os.pread(descriptor, _GLANCE, 0)
    except (DamagedFile, OSError):
        return False
    return beginning.startswith(_ZIP) and b"data.pkl" in beginning


def read(path: Path) -> Source:
    """Returns where the tensors lie. Names are the keys of nested dictionaries, joined by points."""
    try:
        return source_of(open_archive(path), LAYOUT)
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def source_of(archive: Archive, layout: str) -> Source:
    """Returns every tensor of an archive, and the plain values at its top."""
    entries = []
    for name, tensor in named_tensors(archive.value):
        try:
            entries.append(archive.entry(name, role_of(name), tensor))
        except DamagedFile as error:
            archive.findings.append(error.finding(archive.path))
    return archive.source(layout, entries, _metadata(archive.value))


def open_archive(path: Path, begin: int = 0, nbytes: int | None = None) -> Archive:
    """Reads the directory and the pickle.

    Args:
        path: Of the file.
        begin: Where in it the archive begins, if it is not all of it.
        nbytes: Of the archive; up to the end of the file if left out.

    Raises:
        DamagedFile: If there is no whole archive with a pickle in it.
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
        if length > _MOST_PICKLE:
            raise DamagedFile(f"holds a pickle of {length} bytes")
        unpickled = unpickle(read_exactly(descriptor, length, offset))
    data = f"{prefix}data/"
    records = {name[len(data) :]: place for name, place in places.items() if name.startswith(data)}
    checksums = tuple(
        Checksum(path, member.filename, *places[member.filename], member.CRC) for member in members if member.CRC
    )
    refusals = filter(None, map(refusal, sorted(unpickled.foreign)))
    return Archive(path, unpickled, records, checksums, [error.finding(path) for error in refusals])


def named_tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yields every tensor in nested containers once, with the keys that lead to it."""
    stack = [(prefix, value, 0)]
    seen: set[int] = set()
    while stack:
        name, item, depth = stack.pop()
        if isinstance(item, StoredTensor):
            yield name, item
        if not isinstance(item, (Mapping, list, tuple)) or isinstance(item, StoredTensor):
            continue
        if id(item) in seen or depth > _MOST_DEPTH:
            continue
        seen.add(id(item))
        pairs = list(item.items()) if isinstance(item, Mapping) else list(enumerate(item))
        stack.extend((f"{name}.{key}" if name else str(key), child, depth + 1) for key, child in reversed(pairs))


def _metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    plain = (str, int, float, bool)
    return {key: inert(item) for key, item in value.items() if isinstance(key, str) and isinstance(item, plain)}


def _extent(tensor: StoredTensor) -> int:
    """Elements from the first to the last."""
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
        raise DamagedFile("is a bare pickle, no archive of torch.save", kind="bare_pickle", remedy=_PICKLE_REMEDY)
    zeros = " (it begins with zeros)" if not any(beginning) else ""
    raise DamagedFile(f"is no archive of torch.save{zeros}: its beginning was overwritten, or it is something else")


def _members(window: Window) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(window) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise DamagedFile(f"is cut off or damaged: the directory at its end cannot be read ({error})") from None
    if len(members) > _MOST_RECORDS or len({member.filename for member in members}) != len(members):
        raise DamagedFile("has a directory that names the same record twice, or far too many")
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
    """The folder in the archive in which torch.save puts everything."""
    names = [member.filename for member in members]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedFile("is an archive, but not one of torch.save: it has no data.pkl")
    return pickles[0].removesuffix("data.pkl")


def _place(window: Window, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes lie: the directory says where its own header does, and that is of variable length."""
    header = read_exactly(window.descriptor, _LOCAL_HEADER.size, window.begin + member.header_offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != _ZIP or offset + member.file_size > window.nbytes:
        raise DamagedFile(f"is damaged: record {member.filename} is not where the directory says")
    return window.begin + offset, member.file_size
