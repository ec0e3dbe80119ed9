"""Compares two models or checkpoints tensor by tensor."""

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
from hallo_numguard.files.manifest.listing import tensor_title
from hallo_numguard.files.manifest.tree import walk
from hallo_numguard.ops.formats import dtype_name

_CHUNK = 1 << 20  # elements compared at a time

_Key = tuple[str, str, str, int | None]  # folder, name, role, and the rank of a tensor that each rank has its own
_Place = tuple[int, tuple[int, ...] | None]  # start and corner of a piece


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> PreflightReport:
    """Compares two files of weights, models or checkpoints, tensor by tensor.

    Every tensor is read once, at most 1 Mi elements of each side at a time.

    Args:
        a: Path of the first.
        b: Path of the second.

    Returns:
        Report with a finding for each tensor that only one side has, or whose shape, dtype or values differ, and the
        number of identical tensors. Values are equal if their bits are, or between dtypes, if their numbers are.

    Raises:
        UnknownLayout: If a path does not exist, or has no layout that can be read.
        OSError: If a file cannot be read.
    """
    left, right = _read("A", Path(a)), _read("B", Path(b))
    shared = [key for key in left.pieces if key in right.pieces]
    differences = [_differences(left.pieces[key], right.pieces[key]) for key in shared]
    only_a = [pieces[0] for key, pieces in left.pieces.items() if key not in right.pieces]
    only_b = [pieces[0] for key, pieces in right.pieces.items() if key not in left.pieces]
    findings = [
        *left.findings,
        *right.findings,
        *(_finding("missing_tensor", entry, "is in A only") for entry in only_a),
        *(_finding("extra_tensor", entry, "is in B only") for entry in only_b),
        *(finding for found in differences for finding in found),
    ]
    identical = differences.count([])
    counts = f"{len(left.pieces)} in A ({a}) and {len(right.pieces)} in B ({b})"
    checked = f"{identical} tensors are identical, of {counts}."
    return PreflightReport(by_severity(findings), (checked,), (*left.unchecked, *right.unchecked))


@dataclass(frozen=True)
class _Side:
    """One side: pieces of each tensor by a key that is the same on both sides, and what could not be read."""

    pieces: Mapping[_Key, Sequence[TensorEntry]]
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


@dataclass
class _Distance:
    """Difference between two tensors.

    Attributes:
        differing: Number of elements that differ.
        largest: Largest absolute difference between elements that are finite in both.
        one_sided: Number of elements that are finite in one tensor only.
    """

    differing: int = 0
    largest: float = 0.0
    one_sided: int = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds the differences between two flat tensors of the same size."""
        if a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)):
            return
        x, y = _wide(a), _wide(b)
        finite = x.isfinite() & y.isfinite()
        self.differing += int(_differing(a, b).sum())
        self.one_sided += int((x.isfinite() ^ y.isfinite()).sum())
        self.largest = max(self.largest, float((x - y)[finite].abs().max())) if finite.any() else self.largest

    def in_words(self, numel: int) -> str:
        """Returns a predicate about tensors of `numel` elements ("differs in ...")."""
        one_sided = f"; {self.one_sided} are finite in one of them only" if self.one_sided else ""
        return f"differs in {self.differing} of {numel} elements, by at most {self.largest:.6g}{one_sided}"


def _read(side: str, path: Path) -> _Side:
    tree = walk(path) if path.is_dir() else None
    found = list(sources(path, tree.files.values() if tree else ()))
    if not found:
        raise UnknownLayout(f"{path} does not exist, or holds no weights that can be read")
    entries = [entry for source in found for entry in source.entries]
    top = os.path.commonpath([entry.file.parent for entry in entries]) if entries else ""
    tensors: dict[_Key, dict[_Place, TensorEntry]] = defaultdict(dict)
    for entry in entries:
        key = (os.path.relpath(entry.file.parent, top), entry.name, entry.role, _own_rank(entry))
        tensors[key].setdefault((entry.start, entry.corner), entry)
    repeated = len(entries) - sum(map(len, tensors.values()))
    ignored = (f"{repeated} tensors of {side} that another file of it holds too.",) if repeated else ()
    return _Side(
        {key: tuple(pieces.values()) for key, pieces in tensors.items()},
        (*(tree.findings if tree else ()), *(finding for source in found for finding in source.findings)),
        (*(sentence for source in found for sentence in source.unchecked), *ignored),
    )


def _own_rank(entry: TensorEntry) -> int | None:
    """The rank of a tensor of which each rank has its own; None for a shared one, of which ranks may save pieces."""
    return entry.rank if entry.whole is None else None


def _whole(pieces: Sequence[TensorEntry]) -> torch.Tensor:
    """The tensor assembled from its pieces.

    Raises:
        DamagedFile: If some are missing.
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
    """The part of the whole tensor that a piece covers."""
    if piece.corner is None:
        return whole.view(-1)[piece.start : piece.start + piece.numel]
    return whole[tuple(slice(at, at + size) for at, size in zip(piece.corner, piece.shape, strict=True))]


def _fits(piece: TensorEntry) -> bool:
    """Whether a piece lies inside its whole tensor."""
    shape = piece.whole_shape
    if piece.corner is None:
        return 0 <= piece.start <= math.prod(shape) - piece.numel
    return len(piece.corner) == len(piece.shape) == len(shape) and all(
        0 <= at <= size - part for at, part, size in zip(piece.corner, piece.shape, shape, strict=True)
    )


def _differences(left: Sequence[TensorEntry], right: Sequence[TensorEntry]) -> list[Finding]:
    wholes = []
    for pieces in (left, right):
        try:
            wholes.append(_whole(pieces))
        except DamagedFile as error:
            return [error.finding(pieces[0].file)]
    a, b = wholes
    entry = right[0]
    if a.shape != b.shape:
        message = f"is {shape_in_words(a.shape)} in A, {shape_in_words(b.shape)} in B"
        return [_finding("shape_differs", entry, message)]
    findings = []
    if a.dtype != b.dtype:
        message = f"is {dtype_name(a.dtype)} in A, {dtype_name(b.dtype)} in B"
        findings.append(_finding("dtype_differs", entry, message))
    distance = _distance(a.reshape(-1), b.reshape(-1))
    if distance.differing:
        findings.append(_finding("values_differ", entry, distance.in_words(a.numel())))
    return findings


def _distance(a: torch.Tensor, b: torch.Tensor) -> _Distance:
    distance = _Distance()
    for begin in range(0, a.numel(), _CHUNK):
        distance.add(a[begin : begin + _CHUNK], b[begin : begin + _CHUNK])
    return distance


def _differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements differ: in any bit, or between dtypes, in value."""
    if a.dtype == b.dtype:
        return (_bytes(a) != _bytes(b)).view(-1, a.element_size()).any(dim=1)
    x, y = _wide(a), _wide(b)
    return (x != y) & ~(x.isnan() & y.isnan())


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8)


def _wide(flat: torch.Tensor) -> torch.Tensor:
    return flat.to(torch.complex128 if flat.is_complex() else torch.float64)


def _finding(kind: str, entry: TensorEntry, message: str) -> Finding:
    title = tensor_title(entry.name, entry.role, _own_rank(entry))
    return Finding(kind, f"{title} {message}", name=entry.name, file=str(entry.file))
