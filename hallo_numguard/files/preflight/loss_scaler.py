"""The loss scaler in a checkpoint: one that is at its minimum ends the run at its first overflow."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source

_FEW_HALVINGS = 3


def check(source: Source) -> list[Finding]:
    """Returns what the state of the loss scaler bodes."""
    return list(_check(source))


def _check(source: Source) -> Iterator[Finding]:
    scaler = source.metadata.get("loss_scaler") or {}
    scale = scaler.get("cur_scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        return
    where = source.root
    if not math.isfinite(scale) or scale <= 0:
        message = f"{where.name} was saved with the loss scale {scale}"
        yield Finding("loss_scale", message, severity="error", file=str(where), remedy="Go back to an earlier one.")
        return
    if scaler.get("dynamic") is False:
        return
    minimum = scaler.get("min_scale") or 1.0
    left = max(0, round(math.log2(scale / minimum))) if minimum > 0 else 0
    if left == 0:
        yield Finding(
            "loss_scale",
            f"{where.name} was saved at the minimum loss scale ({scale:g}): the first overflow will end the run",
            severity="error",
            file=str(where),
            remedy="Something made every step overflow before it was saved: go back to an earlier checkpoint, and look "
            "at its weights (hallo-numguard scan).",
        )
    elif left <= _FEW_HALVINGS:
        yield Finding(
            "loss_scale",
            f"{where.name} was saved at loss scale {scale:g}, {left} halvings above the minimum of {minimum:g}: it was "
            "overflowing",
            file=str(where),
            remedy="Look at its weights (hallo-numguard scan), or go back to an earlier checkpoint.",
        )
