"""The result of all readers: where the bytes of every tensor lie. Loads single tensors from there."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.findings import Finding
from hallo_numguard.ops.layout import unravel

DAMAGED_REMEDY = "Load an intact copy: download it again, or go back to an earlier checkpoint."
_STATE_ROLES = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "max_exp_avg_sq": "max_exp_avg_sq",
    "momentum_buffer": "momentum",
    "step": "step",
    "fp32": "fp32",
}


class UnknownLayout(NumGuardError):
    """The path does not exist, or no reader recognises it."""


class DamagedFile(NumGuardError):
    """A file whose structure cannot be read. Readers turn it into a finding.

    Args:
        cause: Damage, as a predicate without the file's name ("is empty").
        kind: Kind of the finding.
        remedy: Advice.
    """

    def __init__(self, cause: str, kind: str = "damaged_file", remedy: str = DAMAGED_REMEDY) -> None:
        super().__init__(cause)
        self.kind = kind
        self.remedy = remedy

    def finding(self, file: Path) -> Finding:
        """Returns this damage as a finding about `file`."""
        return Finding(self.kind, f"{file.name}: {self}", severity="error", file=str(file), remedy=self.remedy)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, or the piece of one that a rank saved.

    Attributes:
        name: Fully qualified name in the file; for optimizer state, the parameter's name.
        role: "parameter", "buffer", "fp32" (master copy), "exp_avg", "exp_avg_sq", "momentum", "step", "state", ...
        dtype: Element type in the file.
        shape: Shape of the tensor or piece.
        file: File with the bytes.
        offset: Position of the first element, in bytes from the start of the file.
        nbytes: Bytes from the first element to the end of the last.
        stride: Strides in elements; None for contiguous row-major tensors.
        rank: Rank that saved a sharded tensor, else None.
        start: Flat index of the piece's first element in the whole tensor.
        whole: Shape of the whole tensor of a piece; None if it is no piece, or unknown.
        corner: Index of the first element in the whole tensor, for pieces that are blocks; None for flat pieces.
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
        """Shape of the whole tensor, as far as the file has it."""
        return self.shape if self.whole is None else self.whole

    @property
    def numel(self) -> int:
        """Number of elements of the tensor or piece."""
        return math.prod(self.shape)

    def index_of(self, position: int) -> tuple[int, ...]:
        """Returns the index in the whole tensor of the element at `position`, counted in elements from `offset`."""
        if self.corner is None and self.stride is None:
            return unravel(self.start + position, self.whole_shape)
        index = unravel(position, self.shape)
        if self.stride is not None:
            index = _strided_index(position, self.shape, self.stride)
        return index if self.corner is None else tuple(map(sum, zip(self.corner, index, strict=True)))


@dataclass(frozen=True)
class Checksum:
    """CRC-32 that a file stores for `nbytes` of its own bytes from `offset` on, under the record's name."""

    file: Path
    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class Source:
    """Files that belong together, and the tensors in them.

    Attributes:
        layout: Name of the layout, for example "safetensors", "torch" or "deepspeed zero-2".
        root: Path that was opened.
        files: All files of the model or checkpoint.
        entries: Tensors whose bytes were found.
        findings: Damage found in the structure.
        unchecked: Unread contents and the reasons, one sentence each.
        metadata: Plain values in the files beside tensors.
        checksums: Checksums stored in the files, to be compared when the bytes are read.
        not_read: Files of formats that are not read.
        parts: Sources of which this one consists: of a tree its folders, of a folder its files.
    """

    layout: str
    root: Path
    files: tuple[Path, ...] = ()
    entries: Sequence[TensorEntry] = ()
    findings: tuple[Finding, ...] = ()
    unchecked: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()
    not_read: tuple[str, ...] = ()
    parts: tuple[Source, ...] = ()


def load(entry: TensorEntry) -> torch.Tensor:
    """Returns a tensor's values by memory map: pages are read from the file when they are used.

    Writing into the tensor changes a private copy of the page, never the file.

    Raises:
        DamagedFile: If the file ends before the tensor does.
        OSError: If the file cannot be opened.
    """
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    first = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), entry.offset + entry.nbytes - first, access=mmap.ACCESS_COPY, offset=first)
        except ValueError as error:
            raise DamagedFile(f"{entry.file.name} ends before the data of {entry.name}") from error
    count = entry.nbytes // entry.dtype.itemsize
    flat = torch.frombuffer(view, dtype=entry.dtype, count=count, offset=entry.offset - first)
    if entry.stride is not None:
        return flat.as_strided(entry.shape, entry.stride)
    return flat.view(entry.shape) if entry.numel == count else flat


def role_of(name: str) -> str:
    """Returns the role in the last part of a tensor's name; "parameter" unless it is optimizer state."""
    return _STATE_ROLES.get(name.rpartition(".")[2], "parameter")


def state_role(key: str) -> str:
    """Returns the role of a tensor in the state of an optimizer, by its key there."""
    return _STATE_ROLES.get(key, "state")


def damaged(layout: str, path: Path, error: DamagedFile) -> Source:
    """Returns the source of a file in which nothing can be read."""
    return Source(layout, path, (path,), findings=(error.finding(path),))


def joined(layout: str, root: Path, sources: Iterable[Source], **metadata: Any) -> Source:
    """Returns one source with the files, tensors, findings and checksums of several."""
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
        tuple(name for part in parts for name in part.not_read),
        tuple(parts),
    )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a contiguous tensor."""
    if 0 in shape:
        return (1,) * len(shape)
    return tuple(itertools.accumulate(reversed(shape[1:]), initial=1, func=lambda a, b: a * b))[::-1] if shape else ()


def _strided_index(position: int, shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The index of the element at or before `position`; strides may leave gaps between elements."""
    index = [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: -stride[axis]):
        if stride[axis] > 0:
            index[axis] = min(position // stride[axis], shape[axis] - 1)
            position -= index[axis] * stride[axis]
    return tuple(index)
