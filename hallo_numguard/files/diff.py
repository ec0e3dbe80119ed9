"""Two models or checkpoints, compared tensor by tensor."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hallo_numguard.core.findings import Finding, PreflightReport, by_severity
from hallo_numguard.core.records import shape_in_words
from hallo_numguard.files.formats import DamagedFile, TensorEntry, UnknownLayout, load
from hallo_numguard.files.manifest.facts import sources
from hallo_numguard.files.manifest.file_names import title
from hallo_numguard.files.manifest.tree import walk
from hallo_numguard.ops.formats import dtype_name

_CHUNK = 1 << 20  # elements that are compared at a time

_Key = tuple[str, str, str, int | None]  # folder, name, role, and rank where each has its own
_Place = tuple[int, tuple[int, ...] | None]  # of a piece in the whole tensor


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> PreflightReport:
    """Compares two files of weights, models or checkpoints, tensor by tensor.

    Args:
        a: Path of the one.
        b: Path of the other.

    Returns:
        A finding for each tensor that only one of them has, or whose shape, dtype or values differ; and how many are
        identical. Values are equal if their bits are; of tensors of different dtypes, if their numbers are.

    Raises:
        UnknownLayout: If one of them is not there, or of no layout that can be read.
        OSError: If a file cannot be read.

    Cost: every tensor is read once, as much as 1 Mi elements of each side at a time.
    """
    left, right = _read("A", Path(a)), _read("B", Path(b))
    pairs = {key: _differences(ours, right.pieces[key]) for key, ours in left.pieces.items() if key in right.pieces}
    findings = [
        *left.findings,
        *right.findings,
        *(
            _finding("missing_tensor", entry, "is in A only")
            for key, (entry, *_) in left.pieces.items()
            if key not in pairs
        ),
        *(
            _finding("extra_tensor", entry, "is in B only")
            for key, (entry, *_) in right.pieces.items()
            if key not in pairs
        ),
        *(finding for differences in pairs.values() for finding in differences),
    ]
    identical = sum(not differences for differences in pairs.values())
    counts = f"{len(left.pieces)} in A ({a}) and {len(right.pieces)} in B ({b})"
    checked = f"{identical} tensors are identical, of {counts}."
    return PreflightReport(by_severity(findings), (checked,), (*left.unchecked, *right.unchecked))


@dataclass(frozen=True)
class _Side:
    """One of the two: the pieces of its tensors, by what makes one that of the other side; what could not be read."""

    pieces: Mapping[_Key, Sequence[TensorEntry]]
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


@dataclass
class _Distance:
    """How far two tensors are apart.

    Attributes:
        differing: Number of elements that differ.
        largest: Absolute difference among those that are finite in both.
        one_sided: Number of elements that are finite in one only.
    """

    differing: int = 0
    largest: float = 0.0
    one_sided: int = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds what elements at the same places differ in; both tensors are flat."""
        if a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)):
            return
        x, y = _wide(a), _wide(b)
        finite = x.isfinite() & y.isfinite()
        self.differing += int(_differing(a, b).sum())
        self.one_sided += int((x.isfinite() ^ y.isfinite()).sum())
        self.largest = max(self.largest, float((x - y)[finite].abs().max())) if finite.any() else self.largest

    def in_words(self, numel: int) -> str:
        """Returns it as a sentence without its subject."""
        one_sided = f"; {self.one_sided} are finite in one of them only" if self.one_sided else ""
        return f"differs in {self.differing} of {numel} elements, by at most {self.largest:.6g}{one_sided}"


def _read(side: str, path: Path) -> _Side:
    tree = walk(path) if path.is_dir() else None
    found = list(sources(path, tree.files.values() if tree else ()))
    if not found:
        raise UnknownLayout(f"{path} is not there, or holds no weights that can be read")
    entries = [entry for source in found for entry in source.entries]
    top = os.path.commonpath([entry.file.parent for entry in entries]) if entries else ""
    tensors: dict[_Key, dict[_Place, TensorEntry]] = defaultdict(dict)
    for entry in entries:
        key = (os.path.relpath(entry.file.parent, top), entry.name, entry.role, _own_rank(entry))
        tensors[key].setdefault((entry.start, entry.corner), entry)
    twice = len(entries) - sum(map(len, tensors.values()))
    again = (f"{twice} tensors of {side} that another file of it has as well.",) if twice else ()
    return _Side(
        {key: tuple(pieces.values()) for key, pieces in tensors.items()},
        (*(tree.findings if tree else ()), *(finding for source in found for finding in source.findings)),
        (*(sentence for source in found for sentence in source.unchecked), *again),
    )


def _own_rank(entry: TensorEntry) -> int | None:
    """The rank that a tensor is of; None if it is everybody's, though each may have saved a piece."""
    return entry.rank if entry.whole is None else None


def _whole(pieces: Sequence[TensorEntry]) -> torch.Tensor:
    """The tensor that pieces are of.

    Raises:
        DamagedFile: If they are not all of it.
    """
    first, shape = pieces[0], pieces[0].whole_shape
    if first.whole is None:
        return load(first)
    if sum(piece.numel for piece in pieces) != math.prod(shape) or not all(map(_fits, pieces)):
        raise DamagedFile(f"{first.name} is not whole: pieces of it are missing")
    whole = torch.empty(shape, dtype=first.dtype)
    for piece in pieces:
        place = _place(whole, piece)
        place.copy_(load(piece).reshape(place.shape))
    return whole


def _place(whole: torch.Tensor, piece: TensorEntry) -> torch.Tensor:
    """Where in the whole tensor a piece lies."""
    if piece.corner is None:
        return whole.view(-1)[piece.start : piece.start + piece.numel]
    return whole[tuple(slice(at, at + size) for at, size in zip(piece.corner, piece.shape, strict=True))]


def _fits(piece: TensorEntry) -> bool:
    """Whether a piece lies inside of the tensor that it says it is of."""
    shape = piece.whole_shape
    if piece.corner is None:
        return 0 <= piece.start <= math.prod(shape) - piece.numel
    return len(piece.corner) == len(piece.shape) == len(shape) and all(
        0 <= at <= size - part for at, part, size in zip(piece.corner, piece.shape, shape, strict=True)
    )


def _differences(ours: Sequence[TensorEntry], theirs: Sequence[TensorEntry]) -> list[Finding]:
    a, b = ours[0], theirs[0]
    try:
        one = _whole(ours)
    except DamagedFile as error:
        return [error.finding(a.file)]
    try:
        other = _whole(theirs)
    except DamagedFile as error:
        return [error.finding(b.file)]
    if one.shape != other.shape:
        message = f"is {shape_in_words(one.shape)} in A, {shape_in_words(other.shape)} in B"
        return [_finding("shape_differs", b, message)]
    findings = []
    if one.dtype != other.dtype:
        findings.append(
            _finding("dtype_differs", b, f"is {dtype_name(one.dtype)} in A, {dtype_name(other.dtype)} in B")
        )
    distance = _distance(one.reshape(-1), other.reshape(-1))
    if distance.differing:
        findings.append(_finding("values_differ", b, distance.in_words(one.numel())))
    return findings


def _distance(a: torch.Tensor, b: torch.Tensor) -> _Distance:
    distance = _Distance()
    for begin in range(0, a.numel(), _CHUNK):
        distance.add(a[begin : begin + _CHUNK], b[begin : begin + _CHUNK])
    return distance


def _differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements differ: in a bit, or in value where the dtypes are not the same."""
    if a.dtype == b.dtype:
        return (_bytes(a) != _bytes(b)).view(-1, a.element_size()).any(dim=1)
    x, y = _wide(a), _wide(b)
    return (x != y) & ~(x.isnan() & y.isnan())


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)


def _wide(flat: torch.Tensor) -> torch.Tensor:
    return flat.to(torch.complex128 if flat.is_complex() else torch.float64)


def _finding(kind: str, entry: TensorEntry, message: str) -> Finding:
    return Finding(
        kind, f"{title(entry.name, entry.role, _own_rank(entry))} {message}", name=entry.name, file=str(entry.file)
    )
