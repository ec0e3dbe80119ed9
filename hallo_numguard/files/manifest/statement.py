"""in-toto statements about files, as OpenSSF model signing v1 writes them, and about the tensors in the files.

A statement is accepted only if writing its content again gives the same bytes, so no field can be altered unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hallo_numguard.core.documents import decode, encode
from hallo_numguard.core.records import Record
from hallo_numguard.files.manifest.listing import TENSORS, UNLISTED, DamagedManifest, Listing, path_order

SCHEMA_VERSION = 1
FILES_PREDICATE = "https://model_signing/signature/v1.0"
TENSORS_PREDICATE = "https://hallo-numguard/tensors/v1"
ALGORITHM = "sha256"

_STATEMENT = "https://in-toto.io/Statement/v1"
_DIGEST_DIGITS = 64
_RECORD_FIELDS = ("nan", "pos_inf", "neg_inf", "absmax", "sumsq", "first_nonfinite")
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class TensorFacts:
    """A tensor, or a piece of one, as a manifest describes it.

    Attributes:
        name: Name, as in `TensorEntry`.
        role: Role, as in `TensorEntry`.
        rank: Rank that saved it, as in `TensorEntry`.
        start: Flat index of its first element, as in `TensorEntry`.
        corner: Index of its first element, as in `TensorEntry`.
        dtype: Name of the dtype, as in torch.
        shape: Shape of the tensor or piece.
        digest: sha256 of its bytes in the file, in hexadecimal.
        record: Statistics of its values; None for dtypes without NaN (integers).
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
    """A file's size in bytes, and its tensors in order."""

    size: int
    tensors: tuple[TensorFacts, ...] = ()


@dataclass(frozen=True)
class Contents:
    """A statement about tensors: name of the model, root digest of its files, and the content of each, by name."""

    model: str
    root: str
    files: Mapping[str, FileContents]


def root_digest(digests: Iterable[str]) -> str:
    """Returns the sha256 over the raw digests of all files, in the order of their names."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def write_files(listing: Listing) -> bytes:
    """Returns the statement about files."""
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
    """Returns the content of a statement about files.

    Args:
        data: The statement.
        source: Name of its file.

    Raises:
        DamagedManifest: If it is malformed, or not as it was written.
    """
    document = _parse(data, source, FILES_PREDICATE)
    try:
        resources = document["predicate"]["resources"]
        digests = {decode(str, item["name"]): _digest(item["digest"]) for item in resources}
        links = document["predicate"]["serialization"]["allow_symlinks"] is True
        model = decode(str, document["subject"][0]["name"])
        listing = Listing(source, ALGORITHM, digests, complete=True, model=model, links=links)
        is_unaltered = write_files(listing) == data and list(digests) == sorted(digests, key=path_order)
    except _MALFORMED as error:
        raise DamagedManifest(f"{source} is damaged: {error!r}") from error
    if not is_unaltered:
        raise DamagedManifest(f"{source} is not as it was written: something in it was altered")
    return listing


def write_contents(contents: Contents) -> bytes:
    """Returns the statement about tensors."""
    predicate = {
        "schema_version": SCHEMA_VERSION,
        "files": [
            {"name": name, "size": file.size, "tensors": list(map(_document, file.tensors))}
            for name, file in contents.files.items()
        ],
    }
    return _write(contents.model, contents.root, TENSORS_PREDICATE, encode(predicate))


def read_contents(data: bytes) -> Contents:
    """Returns the content of a statement about tensors.

    Raises:
        DamagedManifest: If it is malformed, of another schema version, or not as it was written.
    """
    document = _parse(data, TENSORS, TENSORS_PREDICATE)
    try:
        (subject,) = document["subject"]
        predicate = document["predicate"]
        version = predicate["schema_version"]
        if version != SCHEMA_VERSION:
            raise DamagedManifest(f"{TENSORS} is of schema version {version!r}; this version reads {SCHEMA_VERSION}")
        files = {decode(str, item["name"]): decode(FileContents, item) for item in predicate["files"]}
        for tensor in (tensor for file in files.values() for tensor in file.tensors):
            _digest(tensor.digest)
            if tensor.record is not None and not tensor.record.sumsq >= 0:
                raise ValueError(f"expected a sum of squares, got {tensor.record.sumsq}")
        contents = Contents(decode(str, subject["name"]), _digest(subject["digest"][ALGORITHM]), files)
        is_unaltered = write_contents(contents) == data
    except _MALFORMED as error:
        raise DamagedManifest(f"{TENSORS} is damaged: {error!r}") from error
    if not is_unaltered:
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
        raise DamagedManifest(f"{source} is not a JSON document: {error}") from error
    found = document.get("predicateType") if isinstance(document, dict) else None
    if found != predicate_type:
        raise DamagedManifest(f"{source} should be a statement of type {predicate_type}, got {found!r}")
    return document


def _document(tensor: TensorFacts) -> dict[str, Any]:
    record = None if tensor.record is None else {name: getattr(tensor.record, name) for name in _RECORD_FIELDS}
    return {**vars(tensor), "record": record}


def _digest(value: Any) -> str:
    if len(bytes.fromhex(value)) * 2 != _DIGEST_DIGITS:
        raise ValueError(f"expected {_DIGEST_DIGITS} digits, got {value!r}")
    return str(value)
