"""Plain PyTorch: the oracle for every kernel, and the fallback on any device.

Works on the bits of the format, so that nothing depends on how a machine converts or flushes values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from hallo_numguard.core.records import RECORD_FIELDS
from hallo_numguard.ops.formats import FORMATS, Format
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.tensor_list import TensorList

_PIECE = 1 << 20  # elements; bounds the memory that the float64 temporaries take


def unavailable(device_type: str) -> str | None:
    """Returns None: this backend can always run."""
    return None


def tensor_stats(flat: torch.Tensor, layout: Layout | None, detail: bool) -> torch.Tensor:
    """Runs `api.tensor_stats`. Cost: about 20 launches and 60 bytes per element, for each segment."""
    flat = flat.detach().reshape(-1)
    offsets = [0, flat.numel()] if layout is None else layout.offsets.tolist()
    return _records([flat[begin:end] for begin, end in pairwise(offsets)], detail, flat.device)


def multi_tensor_stats(tensors: TensorList, detail: bool) -> torch.Tensor:
    """Runs `api.multi_tensor_stats`."""
    return _records([tensor.detach().reshape(-1) for tensor in tensors.tensors], detail, tensors.device)


def _records(segments: Sequence[torch.Tensor], detail: bool, device: torch.device) -> torch.Tensor:
    if not segments:
        return torch.empty((0, len(RECORD_FIELDS)), dtype=torch.int64, device=device)
    return torch.stack([_record(segment, detail) for segment in segments])


def _record(segment: torch.Tensor, detail: bool) -> torch.Tensor:
    """int64 [8]: the record of one segment."""
    total = _empty_record(segment.device)
    for begin in range(0, segment.numel(), _PIECE):
        piece = _piece_record(segment[begin : begin + _PIECE], detail)
        total = _append(total, piece, begin)
    return total


def _piece_record(values: torch.Tensor, detail: bool) -> torch.Tensor:
    spec = FORMATS[values.dtype]
    bits = values.view(spec.bits).to(torch.int64)
    negative = bits < 0
    magnitude = bits & spec.magnitude_mask
    bad = magnitude >= spec.infinity
    infinite = (magnitude == spec.infinity) & spec.has_inf
    numbers = decode(magnitude.masked_fill(bad, 0), spec)
    zeros = (magnitude == 0).sum() * int(detail)
    subnormals = ((magnitude > 0) & (magnitude < spec.smallest_normal)).sum() * int(detail)
    first = torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1)
    integers = [
        (bad & ~infinite).sum(),
        (infinite & ~negative).sum(),
        (infinite & negative).sum(),
        zeros,
        subnormals,
        first,
    ]
    # The largest bits, not the largest number: a comparison of floats may take subnormals for zero.
    absmax = decode(magnitude.masked_fill(bad, 0).max(), spec)
    floats = torch.stack([absmax, (numbers * numbers).sum()])
    return torch.cat([torch.stack(integers), floats.view(torch.int64)])


def decode(magnitude: torch.Tensor, spec: Format) -> torch.Tensor:
    """float64: the values of finite, non-negative bits (int64) of a format."""
    if spec.bits is torch.int64:
        return magnitude.view(torch.float64)
    exponent = magnitude >> spec.mantissa
    mantissa = magnitude & (spec.smallest_normal - 1)
    significand = torch.where(exponent > 0, mantissa + spec.smallest_normal, mantissa)
    power = torch.where(exponent > 0, exponent - 1, 0) + spec.unit
    two_to_the_power = ((power + 1023) << 52).view(torch.float64)  # exact, which torch.pow need not be
    return significand.to(torch.float64) * two_to_the_power


def _empty_record(device: torch.device) -> torch.Tensor:
    record = torch.zeros(len(RECORD_FIELDS), dtype=torch.int64, device=device)
    record[5] = -1
    return record


def _append(left: torch.Tensor, right: torch.Tensor, begin: int) -> torch.Tensor:
    """The combined record of `left` and of `right`, whose elements begin at index `begin`."""
    first = torch.where(right[5] >= 0, right[5] + begin, -1)
    first = torch.where(left[5] >= 0, left[5], first)
    absmax = torch.maximum(left[6:7], right[6:7])  # bits order like the numbers
    sumsq = left[7:].view(torch.float64) + right[7:].view(torch.float64)
    return torch.cat([left[:5] + right[:5], first[None], absmax, sumsq.view(torch.int64)])
