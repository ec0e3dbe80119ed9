"""Names and digests of files in a manifest. Reads and writes the lists of `sha256sum`, `md5sum` and BSD."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hallo_numguard.core.errors import NumGuardError

MANIFEST = "numguard.manifest.json"
TENSORS = "numguard.tensors.json"
SUMS = {"sha256": "SHA256SUMS", "md5": "MD5SUMS"}
SIGNATURE = "model.sig"
HUB_DOWNLOADS = ".cache/huggingface"
UNLISTED = (".git", ".gitattributes", ".github", ".gitignore", HUB_DOWNLOADS, MANIFEST, *SUMS.values())
"""Paths below the root that no manifest lists: the manifest itself, and what changes while the model does not."""
MAX_MANIFEST_BYTES = 256 << 20  # some hundred thousand tensors take a tenth of it

_LEFTOVER = re.compile(r"\.(?:numguard\.\w+\.json|SHA256SUMS|MD5SUMS)\.\d+\.[0-9a-f]{8}")
_ALGORITHMS = {32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}  # by number of digits
_PLAIN_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{32,128}) [ *](.+)", re.DOTALL)
_TAGGED_LINE = re.compile(rb"(\\?)(MD5|SHA1|SHA224|SHA256|SHA384|SHA512) \((.+)\) = ([0-9a-fA-F]+)", re.DOTALL)
_UNESCAPED = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}
_ESCAPED = {plain: escaped for escaped, plain in _UNESCAPED.items()}


class DamagedManifest(NumGuardError):
    """A manifest that is not as it was written. The text names the file and the problem."""


@dataclass(frozen=True)
class Listing:
    """The files that a manifest lists.

    Attributes:
        source: Name of the manifest's file.
        algorithm: Algorithm of the digests, as hashlib names it.
        digests: Hexadecimal digest of each file, by name.
        complete: Whether every file of the folder must be listed.
        model: Name of the model; "" where the format has none.
        links: Whether some files are reached through links; False where the format does not say.
    """

    source: str
    algorithm: str
    digests: Mapping[str, str]
    complete: bool
    model: str = ""
    links: bool = False


def is_listed(name: str) -> bool:
    """Returns whether our manifests list a file or folder with this name."""
    return not name.endswith(".sig") and not any(f"{name}/".startswith(f"{other}/") for other in UNLISTED)


def is_leftover(name: str) -> bool:
    """Returns whether the name is that of a temporary file of a manifest, which a killed process leaves."""
    return _LEFTOVER.fullmatch(name) is not None


def path_order(name: str) -> list[str]:
    """Returns the sort key of pathlib and model-signing: by path components, so that `sub/a` precedes `sub.txt`."""
    return name.split("/")


def invalid_reason(name: str) -> str:
    """Returns why a manifest may not list a file under this name; "" for names below the root."""
    parts = name.split("/")
    if not name or "\0" in name:
        return "is not a file name"
    if name.startswith("/"):
        return "is absolute"
    if ".." in parts:
        return "leads out of the folder"
    return "is not in its shortest form" if "" in parts or "." in parts else ""


def tensor_title(name: str, role: str, rank: int | None) -> str:
    """Returns the name of a tensor in messages, for example "exp_avg of hidden.weight (rank 1)"."""
    title = name if role in ("parameter", "buffer") else f"{role} of {name}"
    return title if rank is None else f"{title} (rank {rank})"


def read_bytes(path: Path) -> bytes:
    """Returns the content of a manifest's file.

    Raises:
        DamagedManifest: If it is no file, cannot be read, or is larger than any manifest.
    """
    try:
        if not path.is_file():
            raise DamagedManifest(f"{path.name} is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DamagedManifest(f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamagedManifest(f"{path.name} is larger than {MAX_MANIFEST_BYTES >> 20} MiB, the limit for manifests")
    return data


def write_checksums(digests: Mapping[str, str]) -> bytes:
    """Returns the list that `sha256sum` writes for digests by file name."""
    return b"".join(_line(os.fsencode(name), digest.encode()) for name, digest in digests.items())


def read_checksums(data: bytes, source: str) -> Listing:
    """Returns the files in a list of checksums. Ignores comments, empty lines and `./` before names.

    Args:
        data: Content of the list.
        source: Name of its file.

    Raises:
        DamagedManifest: If a line is malformed, algorithms are mixed, or a file has two digests.
    """
    digests: dict[str, str] = {}
    algorithms = set()
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line or line.startswith(b"#"):
            continue
        algorithm, digest, name = _read_line(line, f"{source}, line {number}")
        if digests.setdefault(name, digest) != digest:
            raise DamagedManifest(f"{source}, line {number}: a second digest of {name}")
        algorithms.add(algorithm)
    if len(algorithms) != 1:
        found = " and ".join(sorted(algorithms)) or "none"
        raise DamagedManifest(f"{source} should hold digests of one algorithm, got {found}")
    return Listing(source, algorithms.pop(), digests, complete=False)


def _line(name: bytes, digest: bytes) -> bytes:
    escaped = re.sub(rb"[\\\n\r]", lambda match: _ESCAPED[match[0]], name)
    return b"%s%s  %s\n" % (b"\\" if escaped != name else b"", digest, escaped)


def _read_line(line: bytes, where: str) -> tuple[str, str, str]:
    """Algorithm, digest and name in a line."""
    if tagged := _TAGGED_LINE.fullmatch(line):
        is_escaped, tag, name, digest = tagged.groups()
        algorithm = tag.decode().lower()
    elif plain := _PLAIN_LINE.fullmatch(line):
        is_escaped, digest, name = plain.groups()
        algorithm = _ALGORITHMS.get(len(digest), "")
    else:
        raise DamagedManifest(f"{where}: expected a digest and a name, as sha256sum writes them")
    if _ALGORITHMS.get(len(digest)) != algorithm:
        raise DamagedManifest(f"{where}: no known digest has {len(digest)} digits")
    if is_escaped:
        name = _unescape(name, where)
    return algorithm, digest.decode().lower(), os.fsdecode(name.removeprefix(b"./"))


def _unescape(name: bytes, where: str) -> bytes:
    parts = re.findall(rb"\\.?|[^\\]+", name, re.DOTALL)
    if any(part.startswith(b"\\") and part not in _UNESCAPED for part in parts):
        raise DamagedManifest(f"{where}: invalid escape sequence in the name")
    return b"".join(_UNESCAPED.get(part, part) for part in parts)
