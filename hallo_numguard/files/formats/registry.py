"""The layouts that can be read. A new one is a module with `recognises` and `read`, and its name in a list here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from hallo_numguard.files.formats import (
    dcp,
    deepspeed_checkpoint,
    gguf_file,
    numpy_file,
    safetensors_file,
    torch_legacy,
    torch_zip,
    unread,
)
from hallo_numguard.files.formats import universal_checkpoint as universal
from hallo_numguard.files.formats.source import Source


class Reader(Protocol):
    """What the module of a layout provides."""

    def recognises(self, path: Path) -> bool:
        """Returns whether the path has this layout, judged by names and first bytes."""

    def read(self, path: Path) -> Source:
        """Returns what the path holds. Damage becomes a finding."""


CHECKPOINTS = cast(
    "tuple[Reader, ...]", (deepspeed_checkpoint, universal, dcp)
)  # folders with a structure of their own
FILES = cast(  # the first that recognises a file wins
    "tuple[Reader, ...]", (unread, gguf_file, numpy_file, torch_legacy, safetensors_file, torch_zip)
)
