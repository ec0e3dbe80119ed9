"""Which tensors of a changed file differ from its manifest, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Record, counts_in_words, shape_in_words
from hallo_numguard.files.manifest.listing import tensor_title
from hallo_numguard.files.manifest.statement import FileContents, TensorFacts

_NORM_TOLERANCE = 1e-6  # relative; records of different instruction sets agree that closely


def changes(file: str, before: FileContents, now: FileContents) -> Iterator[Finding]:
    """Yields a finding for a changed size, and for each missing, extra or changed tensor of a file."""
    if now.size != before.size:
        difference = f"{abs(now.size - before.size)} bytes {'fewer' if now.size < before.size else 'more'}"
        message = f"{file} has {difference} than before: {now.size} instead of {before.size}"
        yield Finding("changed_size", message, severity="error", file=file)
    old = {_key(tensor): tensor for tensor in before.tensors}
    new = {_key(tensor): tensor for tensor in now.tensors}
    for key, tensor in old.items():
        if key not in new:
            yield _finding("missing_tensor", file, tensor, "is missing")
        elif change := _change(tensor, new[key]):
            yield _finding("changed_tensor", file, tensor, change)
    for key, tensor in new.items():
        if key not in old:
            yield _finding("extra_tensor", file, tensor, "is not in the manifest")


def _key(tensor: TensorFacts) -> tuple[object, ...]:
    return tensor.name, tensor.role, tensor.rank, tensor.start, tensor.corner


def _finding(kind: str, file: str, tensor: TensorFacts, message: str) -> Finding:
    return Finding(
        kind,
        f"{file}: {tensor_title(tensor.name, tensor.role, tensor.rank)} {message}",
        name=tensor.name,
        severity="error",
        file=file,
    )


def _change(before: TensorFacts, now: TensorFacts) -> str:
    """How a tensor has changed; "" if it has not."""
    parts = []
    if before.shape != now.shape:
        parts.append(f"was {shape_in_words(before.shape)} and is {shape_in_words(now.shape)}")
    if before.dtype != now.dtype:
        parts.append(f"was {before.dtype} and is {now.dtype}")
    if before.digest != now.digest:
        parts.append(_values(before.record, now.record))
    return "; ".join(parts)


def _values(before: Record | None, now: Record | None) -> str:
    if before is None or now is None:
        return "holds other bytes"
    figures = [
        (name, old, new)
        for name, old, new in (
            ("non-finite", _nonfinite(before), _nonfinite(now)),
            ("absmax", _number(before.absmax), _number(now.absmax)),
            ("norm", *_norms(before, now)),
        )
        if old != new
    ]
    if not figures:
        return "holds other bytes, but the values look alike"
    return "holds other values: " + ", ".join(f"{name} {old} before and {new} now" for name, old, new in figures)


def _nonfinite(record: Record) -> str:
    return counts_in_words(record.nan, record.pos_inf, record.neg_inf) or "none"


def _norms(before: Record, now: Record) -> tuple[str, str]:
    """The norms of the finite elements, with the same text for both if they agree within rounding."""
    old, new = math.sqrt(before.sumsq), math.sqrt(now.sumsq)
    return _number(old), _number(old if math.isclose(old, new, rel_tol=_NORM_TOLERANCE) else new)


def _number(value: float) -> str:
    return f"{value:.9g}"
