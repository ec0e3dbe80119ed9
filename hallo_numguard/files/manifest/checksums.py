"""Lists of checksums as `sha256sum`, `md5sum` and their BSD kin write and check them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hallo_numguard.files.manifest.listing import DamagedManifest, Listing

_ALGORITHMS = {32: "md5", 40: "sha1", 56: "sha224", 64: "sha256", 96: "sha384", 128: "sha512"}
_PLAIN = re.compile(rb"(\\?)([0-9a-fA-F]{32,128}) [ *](.+)", re.DOTALL)
_TAGGED = re.compile(rb"(\\?)(MD5|SHA1|SHA224|SHA256|SHA384|SHA512) \((.+)\) = ([0-9a-fA-F]+)", re.DOTALL)
_ESCAPES = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}
_UNESCAPED = {value: key for key, value in _ESCAPES.items()}


def write(digests: Mapping[str, str]) -> bytes:
    """Returns the list that `sha256sum` would write of these files, by name."""
    return b"".join(_line(os.fsencode(name), digest.encode()) for name, digest in digests.items())


def read(data: bytes, source: str) -> Listing:
    """Returns what a list says. Comments and empty lines are passed over, `./` before a name is dropped.

    Raises:
        DamagedManifest: If a line is none of a list, or lines are of several algorithms, or say two things of a file.
    """
    digests: dict[str, str] = {}
    algorithms = set()
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if not line or line.startswith(b"#"):
            continue
        algorithm, digest, name = _read_line(line, f"{source}, line {number}")
        if digests.setdefault(name, digest) != digest:
            raise DamagedManifest(f"{source}, line {number}: it gives a second digest of {name}")
        algorithms.add(algorithm)
    if len(algorithms) != 1:
        raise DamagedManifest(
            f"{source} should hold digests of one kind, got {' and '.join(sorted(algorithms)) or 'none'}"
        )
    return Listing(source, algorithms.pop(), digests, complete=False)


def _line(name: bytes, digest: bytes) -> bytes:
    escaped = re.sub(rb"[\\\n\r]", lambda match: _UNESCAPED[match[0]], name)
    return b"%s%s  %s\n" % (b"\\" if escaped != name else b"", digest, escaped)


def _read_line(line: bytes, where: str) -> tuple[str, str, str]:
    """The algorithm, the digest and the name that a line gives."""
    if tagged := _TAGGED.fullmatch(line):
        escaped, tag, name, digest = tagged.groups()
        algorithm = tag.decode().lower()
    elif plain := _PLAIN.fullmatch(line):
        escaped, digest, name = plain.groups()
        algorithm = _ALGORITHMS.get(len(digest), "")
    else:
        raise DamagedManifest(f"{where}: expected a digest and a name, as sha256sum writes them")
    if _ALGORITHMS.get(len(digest)) != algorithm:
        raise DamagedManifest(f"{where}: {len(digest)} digits are no digest that is known")
    if escaped:
        name = _unescape(name, where)
    return algorithm, digest.decode().lower(), os.fsdecode(name.removeprefix(b"./"))


def _unescape(name: bytes, where: str) -> bytes:
    parts = re.findall(rb"\\.?|[^\\]+", name, re.DOTALL)
    if any(part.startswith(b"\\") and part not in _ESCAPES for part in parts):
        raise DamagedManifest(f"{where}: a backslash in the name escapes nothing")
    return b"".join(_ESCAPES.get(part, part) for part in parts)
