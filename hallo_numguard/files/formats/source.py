"""What a reader makes of files: where every tensor's bytes lie. No value is read for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.findings import Finding
from hallo_numguard.ops.layout import unravel

DAMAGED_REMEDY = "Load an intact copy: download it again, or go back to an earlier checkpoint."


class UnknownLayout(NumGuardError):
    """A path that is not there, or that no reader knows."""


class DamagedFile(NumGuardError):
    """A file whose structure cannot be read; its text says why. Readers turn it into a finding.

    Args:
        cause: What is wrong, without the name of the file.
        kind: Of the finding.
        remedy: What to do.
    """

    def __init__(self, cause: str, kind: str = "damaged_file", remedy: str = DAMAGED_REMEDY) -> None:
        super().__init__(cause)
        self.kind = kind
        self.remedy = remedy

    def finding(self, file: Path) -> Finding:
        """Returns it as what a report lists."""
        return Finding(self.kind, f"{file.name}: {self}", severity="error", file=str(file), remedy=self.remedy)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, or the piece of one that a rank has saved.

    Attributes:
        name: Fully qualified, as the file has it; of the state of an optimizer, the parameter's.
        role: "parameter", "buffer", "fp32" (master copy), "exp_avg", "exp_avg_sq", "momentum", "step", "state", ...
        dtype: Of the elements in the file.
        shape: Of the tensor, or of the piece.
        file: That holds it.
        offset, nbytes: The run of bytes in the file in which its elements lie.
        stride: In elements, from the start of the run; None if the elements lie one after the other in row-major order.
        rank: That saved it, of a sharded one; else None.
        start: Of a piece, the flat index of its first element in the whole tensor.
        whole: Of a piece, the shape of the whole tensor, if known; else None.
        corner: Of a piece that is a block and no run, the index of its first element in the whole tensor; else None.
    """

    name: str
    role: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None
    rank: int | None = None
    start: int = 0
    whole: tuple[int, ...] | None = None
    corner: tuple[int, ...] | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, as far as the file tells."""
        return self.shape if self.whole is None else self.whole

    @property
    def numel(self) -> int:
        """Number of elements of the tensor, or of the piece."""
        return math.prod(self.shape)

    def index_of(self, position: int) -> tuple[int, ...]:
        """Returns the index, in the whole tensor's shape, of the element at a position in the run."""
        if self.corner is None and self.stride is None:
            return unravel(self.start + position, self.whole_shape)
        inside = unravel(position, self.shape)
        if self.stride is not None:
            inside = _strided_index(position, self.shape, self.stride)
        return inside if self.corner is None else tuple(map(sum, zip(self.corner, inside, strict=True)))


@dataclass(frozen=True)
class Checksum:
    """A CRC-32 that a file holds of a run of its own bytes, named as the file names the run."""

    file: Path
    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class Source:
    """Files that belong together, and the tensors in them.

    Attributes:
        layout: For example "safetensors", "torch" or "deepspeed zero-2".
        root: The path that was opened.
        files: Every file that belongs to it.
        entries: Every tensor whose bytes were found.
        findings: Damage that showed while the structure was read.
        unchecked: What could not be looked at, and why, a sentence each.
        metadata: What the files say besides tensors: inert values only.
        checksums: Those that the files hold, to be compared when the bytes are read.
    """

    layout: str
    root: Path
    files: tuple[Path, ...] = ()
    entries: Sequence[TensorEntry] = ()
    findings: tuple[Finding, ...] = ()
    unchecked: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()


_STATES = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "max_exp_avg_sq": "max_exp_avg_sq",
    "momentum_buffer": "momentum",
    "step": "step",
    "fp32": "fp32",
}


def role_of(name: str) -> str:
    """Returns the role of a tensor by the last part of its name: that of an optimizer's state, or "parameter"."""
    return _STATES.get(name.rpartition(".")[2], "parameter")


def damaged(layout: str, path: Path, error: DamagedFile) -> Source:
    """Returns the source of a file of which nothing can be read."""
    return Source(layout, path, (path,), findings=(error.finding(path),))


def joined(layout: str, root: Path, sources: Iterable[Source], **metadata: Any) -> Source:
    """Returns one source of the tensors, findings and files of several."""
    parts = list(sources)
    return Source(
        layout,
        root,
        tuple(dict.fromkeys(file for part in parts for file in part.files)),
        [entry for part in parts for entry in part.entries],
        tuple(finding for part in parts for finding in part.findings),
        tuple(sentence for part in parts for sentence in part.unchecked),
        metadata,
        tuple(checksum for part in parts for checksum in part.checksums),
    )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a tensor that lies in row-major order."""
    if 0 in shape:
        return (1,) * len(shape)
    return tuple(itertools.accumulate(reversed(shape[1:]), initial=1, func=lambda a, b: a * b))[::-1] if shape else ()


def _strided_index(position: int, shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The index of the element that many elements from the first; of one between elements, that of the one before."""
    index = [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: -stride[axis]):
        if stride[axis] > 0:
            index[axis] = min(position // stride[axis], shape[axis] - 1)
            position -= index[axis] * stride[axis]
    return tuple(index)
