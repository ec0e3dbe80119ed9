"""This rank's gradients before the reduction: after the sum every rank is NaN, and who began is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import Piece, Sums, by_parameter
from hallo_numguard.ops.api import tensor_stats

CALM = 20  # clean steps after an alarm, until nobody looks any more


class LocalGradients:
    """Looks at every gradient as the backward pass makes it. Costs a pass and a launch a parameter while it looks.

    Args:
        parameters: In the session's order.
        when: "never", "on_alarm" (from the step after an overflow on, until `CALM` steps were clean) or "always".

    Attributes:
        muted: Whether gradients that come now are none of the step's.
    """

    def __init__(self, parameters: Sequence[NamedTensor], when: str) -> None:
        self._parameters = parameters
        self._when = when
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: list[tuple[torch.Tensor, Piece]] = []
        self._calm = 0
        self.muted = False
        if when == "always":
            self._watch()

    @property
    def watching(self) -> bool:
        """Whether this step's gradients were looked at, from its first backward on."""
        return bool(self._handles)

    def sums(self, device: torch.device) -> Sums:
        """What this rank's backward passes of the step made, a row a parameter."""
        rows = [row for row, _ in self._seen]
        packed = torch.cat(rows) if rows else torch.empty((0, 8), dtype=torch.int64)
        return by_parameter(packed.to(device), [piece for _, piece in self._seen], len(self._parameters))

    def exchange(self, seen: list[tuple[torch.Tensor, Piece]]) -> list[tuple[torch.Tensor, Piece]]:
        """Goes on with what was seen in another step; returns what was in this one."""
        before, self._seen = self._seen, seen
        return before

    def step_is_over(self, clean: bool) -> None:
        """Forgets the step, and looks in the next one, or no longer."""
        self._seen.clear()
        self._calm = self._calm + 1 if clean else 0
        if self._when != "on_alarm":
            return
        if not clean:
            self._watch()
        elif self._calm >= CALM:
            self.stop()

    def stop(self) -> None:
        """Looks no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self) -> None:
        if self._handles:
            return
        for position, item in enumerate(self._parameters):
            if item.tensor.requires_grad:
                self._handles.append(item.tensor.register_hook(self._look(position)))

    def _look(self, position: int) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if self.muted:
                return
            self._seen.append((tensor_stats(gradient.detach()).packed, Piece(position, 0)))

        return look
