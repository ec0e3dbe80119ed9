"""CRC-32 as zip archives have it, and that of data from those of its parts, so that threads can share a record."""

from __future__ import annotations

import functools
from collections.abc import Iterable

try:
    from isal.isal_zlib import crc32  # five times as fast
except ImportError:
    from zlib import crc32

__all__ = ["crc32", "joined"]

_POLYNOMIAL = 0xEDB88320  # of zip, bits reversed
_ONE = 1 << 31  # x to the power of 0, bits reversed


def joined(parts: Iterable[tuple[int, int]]) -> int:
    """Returns the CRC-32 of parts that lie one after the other, each given as its number of bytes and its CRC-32."""
    total = 0
    for nbytes, value in parts:
        total = _product(total, _power(8 * nbytes)) ^ value
    return total


@functools.lru_cache(maxsize=256)
def _power(exponent: int) -> int:
    """The power of x, modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Of two polynomials over the field of two elements, modulo the polynomial."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
