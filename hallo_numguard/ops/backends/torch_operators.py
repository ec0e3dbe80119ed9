"""Torch's own operators on the CPU: for an installation without a compiler.

What is finite, and not so small that a processor may flush it to zero, takes two passes; the rest goes to the oracle,
piece by piece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from hallo_numguard.core.records import RECORD_FIELDS
from hallo_numguard.ops.backends import reference
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.tensor_list import TensorList

_PIECE = 1 << 20  # elements; bounds the memory that a conversion takes, and what the oracle has to read
_FIRST, _ABSMAX = RECORD_FIELDS.index("first_nonfinite"), RECORD_FIELDS.index("absmax")

# Magnitudes below are left to the oracle: a processor may flush subnormals to zero, and 2^30 times the smallest normal
# number is so large that they vanish beside its square. In formats of fewer exponents they are the processor's normal
# numbers.
_SMALLEST_SAFE = {
    dtype: torch.finfo(dtype).smallest_normal * 2.0**30 if spec.exponent >= 8 else 0.0
    for dtype, spec in FORMATS.items()
}

_Record = tuple[list[int], float]
"""All words of a record but the last, as integers, and the last, sumsq. The bits of absmax order like the numbers, also
where a processor takes subnormals for zero."""


def unavailable(device_type: str) -> str | None:
    """Returns why this backend cannot run on such a device, or None if it can."""
    return None if device_type == "cpu" else f"runs on cpu, not on {device_type}, where it would wait for every segment"


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """Runs `api.tensor_stats`. Cost: two passes, four with detail; 10 us for each segment."""
    flat = flat.detach().reshape(-1)
    offsets = [0, flat.numel()] if layout is None else layout.offsets.tolist()
    return _records([flat[begin:end] for begin, end in pairwise(offsets)], detail)


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """Runs `api.multi_tensor_stats`. Cost: as of `tensor_stats`."""
    return _records([tensor.detach().reshape(-1) for tensor in tensors.tensors], detail)


def _records(segments: Sequence[torch.Tensor], detail: bool) -> torch.Tensor:
    pieces = [piece for segment in segments for piece in _split(segment)]
    found = iter(_measure(pieces))
    records = [_together(segment, found, detail) for segment in segments]
    words = torch.tensor([words for words, _ in records], dtype=torch.int64, device="cpu")
    sums = torch.tensor([sumsq for _, sumsq in records], dtype=torch.float64, device="cpu")
    return torch.cat([words.reshape(-1, _ABSMAX + 1), sums.view(torch.int64)[:, None]], dim=1)


def _split(segment: torch.Tensor) -> Sequence[torch.Tensor]:
    if segment.numel() > _PIECE:
        return segment.split(_PIECE)
    return [segment] if segment.numel() > 0 else []


def _measure(pieces: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, float, float]]:
    """Returns each piece with its largest magnitude, which is not finite where an element is not, and its norm."""
    if not pieces:
        return []
    lows, highs, norms = [], [], []
    for piece in pieces:
        numbers = piece.float() if piece.dtype.itemsize == 1 else piece
        low, high = torch.aminmax(numbers)  # carries NaN along
        lows.append(low)
        highs.append(high)
        norms.append(torch.linalg.vector_norm(numbers, dtype=torch.float64))
    largest = torch.maximum(torch.stack(lows).abs(), torch.stack(highs).abs()).tolist()
    return list(zip(pieces, largest, torch.stack(norms).tolist(), strict=True))


def _together(segment: torch.Tensor, found: Iterable[tuple[torch.Tensor, float, float]], detail: bool) -> _Record:
    """Returns the record of a segment, taking what belongs to it from `found`."""
    source = iter(found)
    if 0 < segment.numel() <= _PIECE:
        return _record(*next(source), detail)
    total, sumsq = _words(), 0.0
    begin = 0
    while begin < segment.numel():
        piece, largest, norm = next(source)
        words, piece_sumsq = _record(piece, largest, norm, detail)
        for place, word in enumerate(words[:_FIRST]):
            total[place] += word
        if total[_FIRST] < 0 <= words[_FIRST]:
            total[_FIRST] = begin + words[_FIRST]
        total[_ABSMAX] = max(total[_ABSMAX], words[_ABSMAX])
        sumsq += piece_sumsq
        begin += piece.numel()
    return total, sumsq


def _words(zeros: int = 0, subnormals: int = 0, absmax: float = 0.0) -> list[int]:
    return [0, 0, 0, zeros, subnormals, -1, int.from_bytes(struct.pack("<d", absmax), "little")]


def _record(piece: torch.Tensor, largest: float, norm: float, detail: bool) -> _Record:
    spec = FORMATS[piece.dtype]
    flushed = largest < _SMALLEST_SAFE[piece.dtype]
    if flushed and largest == 0 and not _magnitudes(piece).any():
        flushed = False
    if flushed or not largest < float("inf"):
        exact = reference.tensor_stats(piece, None, detail)[0]
        return exact[:-1].tolist(), exact[-1:].view(torch.float64).item()
    zeros = subnormals = 0
    if detail:
        magnitudes = _magnitudes(piece)
        zeros = piece.numel() - int(magnitudes.count_nonzero())
        subnormals = int((magnitudes < spec.smallest_normal).sum()) - zeros
    return _words(zeros, subnormals, largest), norm * norm


def _magnitudes(piece: torch.Tensor) -> torch.Tensor:
    spec = FORMATS[piece.dtype]
    return piece.view(spec.bits) & spec.magnitude_mask
