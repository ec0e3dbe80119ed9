"""State of a loss scaler, of any framework."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossScaling:
    """State of the loss scaler, before its update for this overflow.

    Attributes:
        scale: Loss scale in force during the backward pass.
        dynamic: Whether the scale is lowered on an overflow.
        minimum: Lowest value of the scale.
        patience: Number of overflows before the scale is lowered (hysteresis).
        scaler: Name of the scaler, for messages.
        at_minimum: Predicate on what follows once the scale is at its minimum, for messages.
    """

    scale: float
    dynamic: bool
    minimum: float = 1.0
    patience: int = 0
    scaler: str = "DeepSpeed"
    at_minimum: str = "give up"

    @property
    def halvings_left(self) -> int:
        """How often the scale can still be halved."""
        return round(math.log2(self.scale / self.minimum)) if self.can_fall else 0

    @property
    def can_fall(self) -> bool:
        """Whether a lower scale will be tried next."""
        return self.dynamic and self.scale > self.minimum

    def __str__(self) -> str:
        return f"2^{math.log2(self.scale):g} ({self.scale:g})" if self.scale > 0 else f"{self.scale:g}"


UNSCALED = LossScaling(1.0, dynamic=False)
"""State where nothing scales the loss."""
