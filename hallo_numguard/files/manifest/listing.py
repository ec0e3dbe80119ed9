"""What a manifest says of files: the digest of each. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hallo_numguard.core.errors import NumGuardError

LARGEST = 256 << 20
"""Bytes of a manifest that are read at most: some hundred thousand tensors take a tenth of it."""


class DamagedManifest(NumGuardError):
    """A manifest that cannot be what somebody wrote on purpose; its text names the file and what is wrong."""


@dataclass(frozen=True)
class Listing:
    """What a manifest says.

    Attributes:
        source: Name of its file.
        algorithm: Of the digests, as hashlib names it.
        digests: Of each file, in hexadecimal, by name.
        complete: Whether a file that it does not name should not be there.
        model: Name of the model, "" where the format has none.
        links: Whether some of the files are reached through links; False where the format does not tell.
    """

    source: str
    algorithm: str
    digests: Mapping[str, str]
    complete: bool
    model: str = ""
    links: bool = False


def read_bytes(path: Path) -> bytes:
    """Returns what a manifest's file holds.

    Raises:
        DamagedManifest: If it is no file, cannot be read, or is larger than any manifest is.
    """
    try:
        if not path.is_file():
            raise DamagedManifest(f"{path.name} is no file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise DamagedManifest(f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise DamagedManifest(f"{path.name} is larger than {LARGEST >> 20} MiB, which no manifest is")
    return data
