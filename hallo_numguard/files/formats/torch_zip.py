"""Files of torch.save: a zip archive with a pickle and one uncompressed record per storage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import Window, first_bytes, opened, read_exactly
from hallo_numguard.files.formats.pickles import (
    VALUELESS,
    ForeignObject,
    StoredBytes,
    StoredTensor,
    Unpickled,
    plain,
    unpickle,
)
from hallo_numguard.files.formats.source import (
    Checksum,
    DamagedFile,
    Source,
    TensorEntry,
    damaged,
    role_of,
    row_major,
)
from hallo_numguard.files.formats.training_state import state_roles, training_state
from hallo_numguard.files.formats.zip_directory import Member, members, place

LAYOUT = "torch"
UP_TO_CLASSES = "but what is loaded is up to those classes"  # words of a sentence on what could not be checked
_SUFFIXES = (".pt", ".pth", ".ckpt")
_BIN_NAMES = re.compile(r"model|optimizer|scheduler|sampler|adapter|training_args|custom_checkpoint")
_ARRAYS = frozenset(
    f"numpy.{core}multiarray.{name}" for core in ("core.", "_core.") for name in ("_reconstruct", "scalar")
)
_CONTAINERS = frozenset(
    {
        "argparse.Namespace",
        "builtins.bytearray",
        "collections.ChainMap",
        "collections.UserDict",
        "collections.UserList",
        "collections.deque",
        "types.SimpleNamespace",
        *_ARRAYS,
    }
)
_MAX_NAMES = 5  # in a sentence
_MAX_HOLDERS = 1000
_ZIP = b"PK\x03\x04"
_FIRST_RECORD_WITHIN = 512  # bytes
_PICKLE = b"\x80"
_MAX_PICKLE_BYTES = 64 << 20
_MODULE_PARTS = ("_modules", "_parameters", "_buffers", "_local_tensor")  # of objects that hold tensors; not in names
_PICKLE_REMEDY = "Load it where it is trusted and save it again with a current torch, or better as safetensors."


class Program(Exception):
    """An archive of TorchScript."""


@dataclass
class Archive:
    """A file of torch.save.

    Attributes:
        path: The file.
        unpickled: Content of its pickle.
        records: Offset and size in bytes of each storage, by key in small letters.
        checksums: CRC-32 of its records, unless they were not computed when the file was written.
        findings: Damage found so far.
        unchecked: Contents that are not read as a loader reads them, one sentence each.
    """

    path: Path
    unpickled: Unpickled
    records: Mapping[str, tuple[int, int]]
    checksums: tuple[Checksum, ...]
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """The object in the pickle."""
        return self.unpickled.value

    def entry(self, name: str, role: str, tensor: StoredTensor, **more: Any) -> TensorEntry:
        """Returns where a tensor lies; `more` are further fields of the entry.

        Raises:
            DamagedFile: If some of its bytes are missing.
        """
        key = tensor.storage.key.lower()
        if key not in self.records:
            raise DamagedFile(f"lacks the data of {name} (record {key})")
        offset, nbytes = self.records[key]
        nbytes = min(nbytes, tensor.storage.numel * tensor.storage.dtype.itemsize)
        size = tensor.dtype.itemsize
        begin, length = tensor.offset * size, _extent(tensor) * size
        if begin + length > nbytes:
            raise DamagedFile(f"holds {nbytes} bytes for {name}, which needs {begin + length}")
        stride = None if tensor.stride == row_major(tensor.shape) or length == 0 else tensor.stride
        return TensorEntry(name, role, tensor.dtype, tensor.shape, self.path, offset + begin, length, stride, **more)

    def source(self, layout: str, entries: list[TensorEntry], metadata: Mapping[str, Any]) -> Source:
        """Returns the archive as a source with these tensors."""
        found = tuple(self.findings)
        return Source(layout, self.path, (self.path,), entries, found, tuple(self.unchecked), metadata, self.checksums)


def recognises(path: Path) -> bool:
    """Returns whether this is a file of torch.save, by its name or its first record: many files are called .bin."""
    if path.suffix in _SUFFIXES or (path.suffix == ".bin" and _BIN_NAMES.search(path.name)):
        return not path.is_dir()
    beginning = first_bytes(path, _FIRST_RECORD_WITHIN)
    return beginning.startswith(_ZIP) and b"data.pkl" in beginning.lower()


def read(path: Path) -> Source:
    """Returns where the tensors lie. Their names are the keys of nested dictionaries, joined by dots."""
    try:
        return source_of(open_archive(path), LAYOUT)
    except Program as program:
        return Source("TorchScript", path, (path,), not_read=(f"{path.name} (TorchScript: {program})",))
    except DamagedFile as error:
        return damaged(LAYOUT, path, error)


def source_of(archive: Archive, layout: str) -> Source:
    """Returns all tensors of an archive, with the plain values at the top level as metadata."""
    entries = []
    tensors = Tensors(archive.value)
    roles = state_roles(archive.value)
    for name, tensor in tensors:
        try:
            entries.append(archive.entry(name, roles(name) or role_of(name), tensor))
        except DamagedFile as error:
            archive.findings.append(error.finding(archive.path))
    holders = {} if tensors.holders.keys() <= {""} else {"holders": tuple(tensors.holders)[:_MAX_HOLDERS]}
    metadata = {**_metadata(archive.value), **training_state(archive.value), **holders}
    source = archive.source(layout, entries, metadata)
    return replace(source, **_limits(archive, tensors, source))


def _limits(archive: Archive, tensors: Tensors, source: Source) -> dict[str, Any]:
    """What is not read, or not as a loader would: arrays, tensors without values, and objects of foreign classes."""
    name, unchecked = archive.path.name, list(source.unchecked)
    if tensors.valueless:
        listed = ", ".join(tensors.valueless[:_MAX_NAMES])
        unchecked.append(f"{name}: {len(tensors.valueless)} tensors on the meta device have no values ({listed})")
    if tensors.in_objects:
        classes = ", ".join(archive.unpickled.classes()[:_MAX_NAMES])
        unchecked.append(
            f"{name} holds objects of {classes}, not a state dict: the values were read as they are stored, "
            f"{UP_TO_CLASSES}. To check it: load it where it is trusted, and save its state_dict()"
        )
    arrays = (f"{name}: {tensors.arrays} arrays of numpy",) if tensors.arrays else ()
    findings = [one for one in source.findings if one.kind != "classes" or (source.entries and not tensors.in_objects)]
    return {"unchecked": tuple(unchecked), "not_read": (*source.not_read, *arrays), "findings": tuple(findings)}


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
        found = members(window)
        _check_members(found, window)
        prefix = _prefix(found)
        places = {member.name.lower(): place(window, member) for member in found}
        offset, length = places[f"{prefix}data.pkl"]
        if length > _MAX_PICKLE_BYTES:
            raise DamagedFile(f"holds a pickle of {length} bytes")
        unpickled = unpickle(read_exactly(descriptor, length, offset))
        byteorder = read_exactly(descriptor, *places.get(f"{prefix}byteorder", (0, 0))[::-1])
    data = f"{prefix}data/"
    records = {name[len(data) :]: where for name, where in places.items() if name.startswith(data)}
    checksums = tuple(
        Checksum(path, member.name, *places[member.name.lower()], member.crc32) for member in found if member.crc32
    )
    if byteorder.strip() == b"big":
        raise DamagedFile("was written on a big-endian machine", "byteorder", "Load it and save it again on this one.")
    return Archive(path, unpickled, records, checksums, unpickled.code_findings(path))


class Tensors:
    """The tensors in nested containers, with the keys that lead to them joined by dots.

    Args:
        value: Container, tensor or object.

    Attributes:
        holders: Paths of the containers that hold tensors themselves.
        valueless: Names of tensors on the meta device.
        arrays: Number of arrays of numpy.
        in_objects: Whether tensors lie in objects whose class decides what is loaded.
    """

    def __init__(self, value: Any) -> None:
        self.holders: dict[str, None] = {}
        self.valueless: list[str] = []
        self.arrays = 0
        self.in_objects = False
        self._value = value

    def __iter__(self) -> Iterator[tuple[str, StoredTensor]]:
        stack = [("", self._value, False, "")]
        seen: set[int] = set()
        while stack:
            name, item, is_in_object, holder = stack.pop()
            if isinstance(item, StoredBytes):
                item = StoredTensor(item, item.dtype, 0, (item.numel,), (1,))
            if isinstance(item, StoredTensor):
                self.in_objects |= is_in_object
                self.holders[holder] = None
                yield name, item
            elif item is VALUELESS:
                self.valueless.append(name)
            elif id(item) not in seen:
                seen.add(id(item))
                inside = is_in_object or (isinstance(item, ForeignObject) and not _is_container(item.qualified))
                children = [(_joined(name, key), child, inside, name) for key, child in self._children(item)]
                stack.extend(reversed(children))

    def _children(self, item: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(item, dict):
            yield from dict.items(item)
            attributes = getattr(item, "attributes", None)
            if isinstance(attributes, dict):
                yield from ((key, child) for key, child in dict.items(attributes) if key != "_metadata")
        elif isinstance(item, (list, tuple, set, frozenset)):
            yield from enumerate(item)
        elif isinstance(item, ForeignObject):
            self.arrays += item.qualified in _ARRAYS
            yield from enumerate(item.args)
            yield from ((pair if isinstance(pair, tuple) and len(pair) == 2 else (0, pair)) for pair in item.items)
            yield from dict.items(item.state) if isinstance(item.state, dict) else [("state", item.state)]


def _is_container(qualified: str) -> bool:
    """Whether objects of a class hold what they were given: containers, and the places of a tensor's parts."""
    return qualified in _CONTAINERS or qualified.startswith("torch.distributed.")


def _joined(name: str, key: Any) -> str:
    if key in _MODULE_PARTS:
        return name
    return f"{name}.{key}" if name else str(key)


def named_tensors(value: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yields every tensor in nested containers, with the keys that lead to it joined by dots."""
    yield from Tensors(value)


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


def _check_members(found: list[Member], window: Window) -> None:
    if any(member.name.endswith("/constants.pkl") for member in found):
        raise Program("a program; to check its values, save its state_dict()")
    if any(member.method != 0 for member in found):
        raise DamagedFile(
            "holds compressed records, which torch.save never writes", kind="zip_bomb", remedy="Do not unpack it."
        )
    if sum(member.nbytes for member in found) > window.nbytes:
        raise DamagedFile(
            "has a directory whose records add up to more than the file", kind="zip_bomb", remedy="Do not unpack it."
        )


def _prefix(found: list[Member]) -> str:
    """The name of the top folder inside the archive, that of the first record, in small letters and with a slash."""
    folder, slash, _ = found[0].name.lower().partition("/") if found else ("", "", "")
    if not slash or f"{folder}/data.pkl" not in {member.name.lower() for member in found}:
        raise DamagedFile("is a zip archive, but not of torch.save: it has no data.pkl")
    return f"{folder}/"
