"""The floating-point formats, as bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """Encoding of a dtype.

    Attributes:
        code: Number of the dtype in the C++ kernels (csrc/dtypes.h).
        exponent, mantissa: Numbers of bits.
        has_inf: False for e4m3fn, where only all ones is NaN, and other values with the largest exponent are numbers.
        bits: Signed integer dtype of the same size.
    """

    code: int
    exponent: int
    mantissa: int
    bits: torch.dtype
    has_inf: bool = True

    @property
    def magnitude_mask(self) -> int:
        """All bits but the sign."""
        return (1 << (self.exponent + self.mantissa)) - 1

    @property
    def infinity(self) -> int:
        """Bits of the smallest magnitude that is not a number: infinity, or NaN without infinities."""
        if not self.has_inf:
            return self.magnitude_mask
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def smallest_normal(self) -> int:
        """Bits of the smallest normal number; what lies between it and zero is subnormal."""
        return 1 << self.mantissa

    @property
    def unit(self) -> int:
        """Exponent of the smallest subnormal, a power of two."""
        return 2 - (1 << (self.exponent - 1)) - self.mantissa


FORMATS = {
    torch.float32: Format(0, 8, 23, torch.int32),
    torch.float16: Format(1, 5, 10, torch.int16),
    torch.bfloat16: Format(2, 8, 7, torch.int16),
    torch.float64: Format(3, 11, 52, torch.int64),
    torch.float8_e4m3fn: Format(4, 4, 3, torch.int8, has_inf=False),
    torch.float8_e5m2: Format(5, 5, 2, torch.int8),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name in reports, such as "float16"."""
    return str(dtype).removeprefix("torch.")
