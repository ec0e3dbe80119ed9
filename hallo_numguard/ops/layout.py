"""Boundaries of the tensors in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from hallo_numguard.core.errors import InvalidInput

T = TypeVar("T")
_LAYOUT_OF_TENSOR = "_hallo_numguard_layout"


class Layout:
    """The segments of a flat tensor: segment i is `flat[offsets[i]:offsets[i + 1]]`.

    Validated once, here. Make one and pass it to every call: kernels then derive their tables from it once per device.

    Args:
        offsets: n + 1 integers in elements, never decreasing, the first not negative. A sequence, or a 1-D integer
            tensor on the CPU. The last may lie before the end of the flat tensor (padding is not read).

    Raises:
        InvalidInput: If the offsets are anything else.
    """

    def __init__(self, offsets: Sequence[int] | torch.Tensor) -> None:
        values = _as_list(offsets)
        if len(values) < 1:
            raise InvalidInput("offsets must hold n + 1 integers for n segments, got none")
        if values[0] < 0:
            raise InvalidInput(f"offsets must not be negative, got {values[0]} first")
        for index, (begin, end) in enumerate(pairwise(values)):
            if end < begin:
                raise InvalidInput(f"offsets must never decrease, got {begin} and then {end} at index {index + 1}")
        self.offsets = torch.tensor(values, dtype=torch.int64, device="cpu")
        self.segments = len(values) - 1
        self.end = values[-1]
        self._tables: dict[str, object] = {}
        # Operators take tensors only: from this one they find the layout, with its caches.
        setattr(self.offsets, _LAYOUT_OF_TENSOR, self)

    @classmethod
    def of(cls, offsets: torch.Tensor) -> Layout:
        """Returns the layout with this tensor as `offsets`, or a new one."""
        layout = getattr(offsets, _LAYOUT_OF_TENSOR, None)
        return layout if isinstance(layout, cls) else cls(offsets)

    def check_fits(self, numel: int) -> None:
        """Raises InvalidInput if a flat tensor of `numel` elements is too short for these segments."""
        if self.end > numel:
            raise InvalidInput(f"offsets end at {self.end}, but the flat tensor has only {numel} elements")

    def table(self, key: str, make: Callable[[list[int]], T]) -> T:
        """Returns `make(offsets)`, made at the first call with this key."""
        if key not in self._tables:
            self._tables[key] = make(self.offsets.tolist())
        return self._tables[key]  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"Layout({self.segments} segments, {self.end} elements)"


def _as_list(offsets: object) -> list[int]:
    if isinstance(offsets, torch.Tensor):
        if offsets.dim() != 1 or offsets.is_floating_point() or offsets.is_complex():
            raise InvalidInput(
                f"offsets must be a 1-D integer tensor, got shape {tuple(offsets.shape)} and {offsets.dtype}"
            )
        if offsets.device.type != "cpu":
            raise InvalidInput(
                f"offsets must be on the CPU, got {offsets.device}; reading them would synchronise: make a Layout once"
            )
        values: list[int] = offsets.tolist()
        return values
    if isinstance(offsets, Sequence) and not isinstance(offsets, str):
        try:
            return [value.__index__() for value in offsets]
        except AttributeError as error:
            raise InvalidInput(f"offsets must be integers: {error}") from error
    raise InvalidInput(f"offsets must be a Layout, a sequence of integers or a tensor, got {type(offsets).__name__}")


def unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the index in a tensor of that shape of a flat, row-major index."""
    position = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        position.append(rest)
    return tuple(reversed(position))
