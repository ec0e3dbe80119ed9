"""in-toto statements: of files, as OpenSSF model signing v1 has them, and of the tensors in them.

A statement is read only if writing what it says gives the same bytes again. So nothing in it can be altered without
being seen, whatever field it is in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hallo_numguard.core.documents import encode
from hallo_numguard.core.records import Record
from hallo_numguard.files.manifest.file_names import TENSORS, UNLISTED, in_order
from hallo_numguard.files.manifest.listing import DamagedManifest, Listing

SCHEMA_VERSION = 1
FILES_PREDICATE = "https://model_signing/signature/v1.0"
TENSORS_PREDICATE = "https://hallo-numguard/tensors/v1"
ALGORITHM = "sha256"

_STATEMENT = "https://in-toto.io/Statement/v1"
_DIGITS = 64
_KEPT = ("nan", "pos_inf", "neg_inf", "absmax", "sumsq", "first_nonfinite")  # of a record
_FORMS = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class TensorFacts:
    """What a manifest keeps of a tensor.

    Attributes:
        name, role, rank, start, corner: Which one it is, or which piece of one, as the reader of its file tells.
        dtype: As torch names it.
        shape: Of the tensor, or of the piece.
        digest: sha256 of its bytes as they lie in the file, in hexadecimal.
        record: Statistics of its values; None if they are no floating-point numbers.
    """

    name: str
    role: str
    rank: int | None
    start: int
    corner: tuple[int, ...] | None
    dtype: str
    shape: tuple[int, ...]
    digest: str
    record: Record | None


@dataclass(frozen=True)
class FileContents:
    """What a manifest keeps of a file beside its digest: its size in bytes, and its tensors in their order."""

    size: int
    tensors: tuple[TensorFacts, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What a statement of tensors says: the model, the root digest of its files, and what is in each, by name."""

    model: str
    root: str
    files: Mapping[str, FileContents]


def root_digest(digests: Iterable[str]) -> str:
    """Returns sha256 over the raw digests of all files, in the order of their names."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def write_files(listing: Listing) -> bytes:
    """Returns the statement of files."""
    predicate = {
        "serialization": {
            "method": "files",
            "hash_type": ALGORITHM,
            "allow_symlinks": listing.links,
            "ignore_paths": list(UNLISTED),
        },
        "resources": [
            {"name": name, "algorithm": ALGORITHM, "digest": digest} for name, digest in listing.digests.items()
        ],
    }
    return _write(listing.model, root_digest(listing.digests.values()), FILES_PREDICATE, predicate, indent=1)


def read_files(data: bytes, source: str) -> Listing:
    """Returns what a statement of files says; `source` is the name of its file.

    Raises:
        DamagedManifest: If it is none, or not as it was written.
    """
    document = _parse(data, source, FILES_PREDICATE)
    try:
        resources = document["predicate"]["resources"]
        digests = {_text(item["name"]): _digest(item["digest"]) for item in resources}
        links = document["predicate"]["serialization"]["allow_symlinks"] is True
        model = _text(document["subject"][0]["name"])
        listing = Listing(source, ALGORITHM, digests, complete=True, model=model, links=links)
        whole = write_files(listing) == data
    except _FORMS as error:
        raise DamagedManifest(f"{source} is damaged: {error!r}") from error
    if not whole or list(digests) != sorted(digests, key=in_order):
        raise DamagedManifest(f"{source} is not as it was written: something in it was altered")
    return listing


def write_contents(contents: Contents) -> bytes:
    """Returns the statement of tensors."""
    predicate = {
        "schema_version": SCHEMA_VERSION,
        "files": [
            {"name": name, "size": file.size, "tensors": list(map(_document, file.tensors))}
            for name, file in contents.files.items()
        ],
    }
    return _write(contents.model, contents.root, TENSORS_PREDICATE, encode(predicate))


def read_contents(data: bytes) -> Contents:
    """Returns what a statement of tensors says.

    Raises:
        DamagedManifest: If it is none, of another schema version, or not as it was written.
    """
    document = _parse(data, TENSORS, TENSORS_PREDICATE)
    try:
        (subject,) = document["subject"]
        predicate = document["predicate"]
        version = predicate["schema_version"]
        if version != SCHEMA_VERSION:
            raise DamagedManifest(f"{TENSORS} is of schema version {version!r}; this version reads {SCHEMA_VERSION}")
        files = {_text(item["name"]): _contents(item) for item in predicate["files"]}
        contents = Contents(_text(subject["name"]), _digest(subject["digest"][ALGORITHM]), files)
        whole = write_contents(contents) == data
    except _FORMS as error:
        raise DamagedManifest(f"{TENSORS} is damaged: {error!r}") from error
    if not whole:
        raise DamagedManifest(f"{TENSORS} is not as it was written: something in it was altered")
    return contents


def _write(
    model: str, root: str, predicate_type: str, predicate: Mapping[str, Any], indent: int | None = None
) -> bytes:
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": model, "digest": {ALGORITHM: root}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    return json.dumps(statement, allow_nan=False, indent=indent).encode() + b"\n"


def _parse(data: bytes, source: str, predicate_type: str) -> Mapping[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedManifest(f"{source} is no JSON document: {error}") from error
    found = document.get("predicateType") if isinstance(document, dict) else None
    if found != predicate_type:
        raise DamagedManifest(f"{source} should be a statement of type {predicate_type}, got {found!r}")
    return document


def _document(tensor: TensorFacts) -> dict[str, Any]:
    record = None if tensor.record is None else {name: getattr(tensor.record, name) for name in _KEPT}
    return {**vars(tensor), "record": record}


def _contents(document: Mapping[str, Any]) -> FileContents:
    return FileContents(int(document["size"]), tuple(map(_tensor, document["tensors"])))


def _tensor(document: Mapping[str, Any]) -> TensorFacts:
    record = document["record"]
    rank, corner = document["rank"], document["corner"]
    return TensorFacts(
        name=_text(document["name"]),
        role=_text(document["role"]),
        rank=None if rank is None else int(rank),
        start=int(document["start"]),
        corner=None if corner is None else tuple(map(int, corner)),
        dtype=_text(document["dtype"]),
        shape=tuple(map(int, document["shape"])),
        digest=_digest(document["digest"]),
        record=None if record is None else _record(record),
    )


def _record(document: Mapping[str, Any]) -> Record:
    record = Record(
        nan=int(document["nan"]),
        pos_inf=int(document["pos_inf"]),
        neg_inf=int(document["neg_inf"]),
        absmax=float(document["absmax"]),
        sumsq=float(document["sumsq"]),
        first_nonfinite=int(document["first_nonfinite"]),
    )
    if not record.sumsq >= 0:
        raise ValueError(f"expected a sum of squares, got {record.sumsq}")
    return record


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _digest(value: Any) -> str:
    if len(bytes.fromhex(value)) * 2 != _DIGITS:
        raise ValueError(f"expected {_DIGITS} digits, got {value!r}")
    return str(value)
