"""Values as JSON has them. Non-finite numbers are strings, which every JSON reader can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nonfinite(value: Any) -> Any:
    """Returns a value that JSON has: NaN and infinite numbers as strings, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return value
