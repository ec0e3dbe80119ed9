"""Statistics of formats that no kernel reads: 8-bit and 4-bit ones by their 256 bytes, complex ones by their parts."""

from __future__ import annotations

from dataclasses import replace

import torch

from hallo_numguard.core.records import Record
from hallo_numguard.files.formats.source import TensorEntry, load

PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
BYTES = frozenset(
    {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2}
)  # one byte is one value, or two
_FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_CHUNK = 1 << 24


def record_of(entry: TensorEntry) -> Record | None:
    """Returns the statistics of a tensor of such a format, which is read again; None for other dtypes."""
    if entry.dtype not in BYTES:
        return None
    values = byte_values(entry.dtype)
    data = load(entry).view(torch.uint8).flatten()
    counts = torch.zeros(256, dtype=torch.int64)
    for begin in range(0, data.numel(), _CHUNK):
        counts += torch.bincount(data[begin : begin + _CHUNK], minlength=256)
    is_nan = values.isnan().any(dim=1)
    numbers = values.nan_to_num(0.0, 0.0, 0.0).double()
    present = counts > 0
    nan = int(counts[is_nan].sum())
    return Record(
        nan=nan,
        pos_inf=0,
        neg_inf=0,
        absmax=float(numbers[present].abs().max()) if present.any() else 0.0,
        sumsq=float((counts * numbers.square().sum(dim=1)).sum()),
        first_nonfinite=int(is_nan[data.int()].nonzero()[0]) if nan else -1,
    )


def byte_values(dtype: torch.dtype) -> torch.Tensor:
    """Returns the values that each of the 256 bytes stands for, one or two a row."""
    every = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.float4_e2m1fn_x2:
        halves = torch.stack([every & 15, every >> 4], dim=1).int()
        return torch.where(halves >= 8, -_FOUR_BITS[halves & 7], _FOUR_BITS[halves & 7])
    return every.view(dtype).float().unsqueeze(1)


def of_complex(record: Record) -> Record:
    """Returns the statistics of the parts of complex numbers with the place of the first bad number among these."""
    first = record.first_nonfinite
    return replace(record, first_nonfinite=first // 2 if first >= 0 else first)
