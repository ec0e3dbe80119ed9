"""A series of numbers as a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"
_UNKNOWN = " "


def sparkline(values: Sequence[float | None], logarithmic: bool = False) -> str:
    """Returns a character a value: a bar, × where it is not finite, a space where there is none.

    Args:
        values: In order.
        logarithmic: Whether powers of two are evenly spaced; values of 0 and less have the lowest bar.
    """
    scaled = [_scaled(value, logarithmic) for value in values]
    finite = [value for value in scaled if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_character(value, low, high, original) for value, original in zip(scaled, values, strict=True))


def _scaled(value: float | None, logarithmic: bool) -> float | None:
    if value is None or not math.isfinite(value) or not logarithmic:
        return value
    return math.log2(value) if value > 0 else -math.inf


def _character(value: float | None, low: float, high: float, original: float | None) -> str:
    if original is None or value is None:
        return _UNKNOWN
    if not math.isfinite(original):
        return _NOT_FINITE
    if not math.isfinite(value) or high == low:
        return _BARS[0]
    # Halved before they are subtracted: the difference of two finite numbers may be infinite.
    return _BARS[round((value / 2 - low / 2) / (high / 2 - low / 2) * (len(_BARS) - 1))]
