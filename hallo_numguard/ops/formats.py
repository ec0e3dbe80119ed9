"""The floating-point formats, as bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """How a dtype is encoded.

    Attributes:
        code: The number that the C++ kernels know it by (csrc/cpu/kernels.h).
        exponent, mantissa: Number of bits.
        has_inf: False for e4m3fn, whose largest exponent holds numbers, and only all ones is NaN.
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
        """Bits of the smallest magnitude that is not a number: infinity, or NaN where there is none."""
        if not self.has_inf:
            return self.magnitude_mask
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def smallest_normal(self) -> int:
        """Bits of the smallest normal number; what lies between it and zero is subnormal."""
        return 1 << self.mantissa

    @property
    def unit(self) -> int:
        """Power of two that the smallest subnormal is."""
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
    """Returns how a dtype is called in reports, such as "float16"."""
    return str(dtype).removeprefix("torch.")
