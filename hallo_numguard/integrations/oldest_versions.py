"""The oldest supported release of each framework: one table, from which metadata and documents are generated."""

from __future__ import annotations

import re
from importlib import metadata

from hallo_numguard.core.errors import InvalidInput

OLDEST = {
    "torch": "2.4",
    "deepspeed": "0.16",
    "accelerate": "1.2",
    "transformers": "4.48",
    "lightning": "2.4",
    "pytorch_lightning": "2.4",
}


def check_version(distribution: str) -> None:
    """Raises InvalidInput if an older release is installed; unreadable versions are accepted."""
    try:
        installed = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return
    found, oldest = _numbers(installed), _numbers(OLDEST[distribution])
    if found and found < oldest:
        raise InvalidInput(
            f"{distribution} {installed} is installed, and the guard works with {OLDEST[distribution]} and later: "
            f"pip install --upgrade {distribution}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
