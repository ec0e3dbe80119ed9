"""The layouts that can be read. A new one is a new module with `recognises` and `read`, and its name in a list here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from hallo_numguard.files.formats import dcp as distributed
from hallo_numguard.files.formats import deepspeed_checkpoint as deepspeed
from hallo_numguard.files.formats import safetensors_file as safetensors
from hallo_numguard.files.formats import torch_legacy, torch_zip
from hallo_numguard.files.formats import universal_checkpoint as universal
from hallo_numguard.files.formats.source import Source


class Reader(Protocol):
    """What a layout's module offers."""

    def recognises(self, path: Path) -> bool:
        """Returns whether a path is of this layout, at a glance."""

    def read(self, path: Path) -> Source:
        """Returns what it holds. What is damaged becomes a finding."""


CHECKPOINTS = cast("tuple[Reader, ...]", (deepspeed, universal, distributed))  # folders with a structure of their own
FILES = cast("tuple[Reader, ...]", (safetensors, torch_legacy, torch_zip))  # the first that recognises a file reads it
