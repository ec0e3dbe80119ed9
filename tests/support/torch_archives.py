"""Archives of torch.save written by a grammar, intact and odd ones, and what torch.load makes of them."""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.files.formats import load, open_source

RECORD_BYTES = 64
_DTYPES = {"Float": 4, "Half": 2, "BFloat16": 2, "Double": 8, "Long": 8, "Byte": 1, "ComplexFloat": 8}
Found = Counter[tuple[torch.dtype, tuple[int, ...], bytes]]


class Writer:
    """Writes one random pickle, in opcodes."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self._remembered = 0

    def value(self, depth: int = 0) -> bytes:
        """Returns the opcodes of a value: a container more often near the top."""
        kinds = [self.tensor, self.tensor, self.number]
        if depth < 6:
            kinds += [self.mapping, self.ordered, self.sequence, self.group, self.parameter, self.attributes]
        made = self.chance.choice(kinds)(depth)
        if self._remembered and self.chance.random() < 0.1:
            return b"h" + bytes([self.chance.randrange(self._remembered)])
        if self._remembered < 200 and self.chance.random() < 0.3:
            made += b"q" + bytes([self._remembered])
            self._remembered += 1
        return made

    def document(self) -> bytes:
        """Returns a whole pickle."""
        return b"\x80\x02" + self.chance.choice([self.mapping, self.ordered, self.attributes])(0) + b"."

    def number(self, _: int) -> bytes:
        return self.chance.choice([b"K\x07", b"N", b"\x88", b"G" + struct.pack(">d", 0.5), text("x")])

    def tensor(self, _: int) -> bytes:
        name = self.chance.choice(list(_DTYPES))
        numel = RECORD_BYTES // _DTYPES[name] if self.chance.random() < 0.8 else self.chance.randrange(40)
        key = self.chance.choice(["0", "1", "1", "2", "a", "A"])
        shape = tuple(self.chance.randrange(4) for _ in range(self.chance.randrange(4)))
        stride = tuple(self.chance.randrange(4) for _ in shape)
        if self.chance.random() < 0.7:
            stride = tuple(torch.empty(shape, device="meta").stride())
        offset = self.chance.choice([0, 0, 1, self.chance.randrange(20)])
        parts = storage(key, numel, name) + integer(offset) + numbers(shape) + numbers(stride) + b"\x89"
        hooks = glob("collections", "OrderedDict") + b")R"
        return glob("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + hooks + b"tR"

    def parameter(self, depth: int) -> bytes:
        hooks = glob("collections", "OrderedDict") + b")R"
        return glob("torch._utils", "_rebuild_parameter") + b"(" + self.tensor(depth) + b"\x89" + hooks + b"tR"

    def mapping(self, depth: int) -> bytes:
        return b"}(" + self._items(depth) + b"u"

    def ordered(self, depth: int) -> bytes:
        kind = self.chance.choice(["OrderedDict", "OrderedDict", "Counter"])
        return glob("collections", kind) + b")R(" + self._items(depth) + b"u"

    def attributes(self, depth: int) -> bytes:
        names = ["items", "keys", "__iter__", "_metadata", "get", "__class__", "zzz"]
        state = b"}(" + text(self.chance.choice(names)) + self.value(depth + 1) + b"u"
        return self.ordered(depth) + state + b"b"

    def sequence(self, depth: int) -> bytes:
        inside = b"".join(self.value(depth + 1) for _ in range(self.chance.randrange(4)))
        return b"](" + inside + b"e" if self.chance.random() < 0.5 else b"(" + inside + b"t"

    def group(self, depth: int) -> bytes:
        return glob("__builtin__", "set") + b"(](" + self.tensor(depth) + b"etR"

    def _items(self, depth: int) -> bytes:
        keys = [self._key() for _ in range(1 + self.chance.randrange(4))]
        return b"".join(key + self.value(depth + 1) for key in keys)

    def _key(self) -> bytes:
        return text(self.chance.choice("abcde")) if self.chance.random() < 0.9 else b"K\x05"


def text(value: str) -> bytes:
    """Returns the opcodes of a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    """Returns the opcodes of a small number."""
    return b"K" + bytes([value])


def numbers(values: tuple[int, ...]) -> bytes:
    """Returns the opcodes of a tuple of small numbers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def glob(module: str, name: str) -> bytes:
    """Returns the opcodes of a name to import."""
    return f"c{module}\n{name}\n".encode()


def storage(key: str, numel: int, name: str) -> bytes:
    """Returns the opcodes of a storage."""
    parts = text("storage") + glob("torch", f"{name}Storage") + text(key) + text("cpu") + integer(numel)
    return b"(" + parts + b"tQ"


def archive(records: list[tuple[str, bytes]], chance: random.Random | None = None) -> bytes:
    """Returns a zip archive; with `chance`, sometimes with what loaders differ about."""
    odd = "" if chance is None else chance.choice(["", "", "", "two", "gap", "tail", "extra", "offset"])
    data, places = b"", []
    for name, content in records:
        places.append(len(data))
        extra = b"FB\x04\x00ZZZZ" if odd == "extra" else b""
        head = (20, 0, 0, 0, 0, zlib.crc32(content), len(content), len(content), len(name), len(extra))
        data += struct.pack("<4s5H3I2H", b"PK\3\4", *head) + name.encode() + extra + content
    if odd == "two" and chance is not None:
        hidden = directory([(name, chance.randbytes(len(content))) for name, content in records], places)
        data += hidden
    begin = len(data)
    listing = directory(records, places)
    data += listing + (b"\0" * 7 if odd == "gap" else b"")
    where = begin + (3 if odd == "offset" else 0)
    data += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(listing), where, 0)
    return data + (b"\n" if odd == "tail" else b"")


def directory(records: list[tuple[str, bytes]], places: list[int]) -> bytes:
    """Returns the directory of an archive."""
    made = b""
    for (name, content), place in zip(records, places, strict=True):
        sizes = (zlib.crc32(content), len(content), len(content), len(name), 0, 0, 0, 0, 0, place)
        made += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes) + name.encode()
    return made


def random_archive(seed: int) -> bytes:
    """Returns an archive of a random pickle and random records."""
    chance = random.Random(seed)
    pickle_name = "data.pkl" if chance.random() < 0.95 else "DATA.pkl"
    records = [(f"archive/{pickle_name}", Writer(chance).document())]
    if chance.random() < 0.1:
        records.append(("archive/Data.pkl", Writer(chance).document()))
    if chance.random() < 0.5:
        records.append(("archive/byteorder", b"big" if chance.random() < 0.1 else b"little"))
    keys = ["0", "1", "2", "a"] + (["A"] if chance.random() < 0.1 else [])
    for key in keys:
        folder = "data" if chance.random() < 0.98 else "DATA"
        records.append((f"archive/{folder}/{key}", chance.randbytes(RECORD_BYTES)))
    records.append(("archive/version", b"3\n"))
    if chance.random() < 0.1:
        chance.shuffle(records)
    return archive(records, chance)


def loaded(path: Path) -> Found | None:
    """Returns the tensors that torch.load gives with weights_only=True; None if it refuses the file."""
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
        return Counter(map(_bytes, tensors_in(value)))
    except Exception:  # noqa: BLE001 - whatever it says, it gives nothing
        return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in containers, each once, without asking methods that a pickle may have replaced."""
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            stack += dict.values(item)
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item


def _bytes(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).flatten()
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def difference(path: Path) -> str | None:
    """Returns what torch.load gives and the scanner does not see, unless this says that it could not tell."""
    given = loaded(path)
    source = open_source(path)
    if given is None or source.findings or source.unchecked:
        return None
    seen = Counter(_bytes(load(entry)) for entry in source.entries)
    missing = [key[:2] for key in given if key not in seen]
    return f"{len(missing)} tensors such as {missing[0]}" if missing else None
