"""Divides the trained weights into parts of like size, which looks at updates read in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.readable import is_plain

SMALL_BYTES = 4 << 20  # weights that are always read whole
SMALL_COUNT = 512  # if they are no more: a look takes some 50 ns for each tensor
PARTS = 32


class Stretch(NamedTuple):
    """What a look reads of a weight: this rank's part of it, or some of its elements.

    Attributes:
        position: Position in the guard's list of parameters.
        start: Flat index of the first element in this rank's part.
        stop: Flat index after the last; None for all of it.
    """

    position: int
    start: int = 0
    stop: int | None = None


class Part:
    """Weights that are read together.

    Args:
        parameters: The guard's list of parameters.
        stretches: What is read.

    Attributes:
        stretches: The same, in the order of `tensors`.
    """

    def __init__(self, parameters: Sequence[NamedTensor], stretches: Iterable[Stretch]) -> None:
        as_they_are: list[Stretch] = []
        slices: list[Stretch] = []
        made: list[Stretch] = []
        for stretch in stretches:
            item = parameters[stretch.position]
            is_whole = stretch.stop is None and not hasattr(item.tensor, "_local_tensor")
            (made if not is_whole else as_they_are if item.slice is None else slices).append(stretch)
        self.stretches = [*as_they_are, *slices, *made]
        self._as_they_are = [parameters[stretch.position].tensor for stretch in as_they_are]
        self._slices = [read for at, *_ in slices if (read := parameters[at].slice) is not None]
        self._made = [(parameters[position], start, stop) for position, start, stop in made]

    def tensors(self) -> list[torch.Tensor]:
        """Returns what is read now: no Python code for a weight that is read as it is."""
        if not self._made and not self._slices:
            return self._as_they_are  # to copy the list would take longer than to scan it: it touches every object
        made = [
            held(item) if stop is None else item.tensor.detach().reshape(-1)[start:stop]
            for item, start, stop in self._made
        ]
        return [*self._as_they_are, *[read()[0] for read in self._slices], *made]


class WeightParts:
    """The trained weights, divided.

    Args:
        parameters: The guard's list of parameters.
        trained: Positions of the trained ones.
        in_one: Whether all are one part, of whatever size.

    Attributes:
        count: Number of parts; one, of all, if the weights are few and small.
        part_of: Numbers of the parts in which each weight is, by position.
    """

    def __init__(self, parameters: Sequence[NamedTensor], trained: Sequence[int], in_one: bool) -> None:
        self._parameters = parameters
        self._all = Part(parameters, map(Stretch, trained))
        self._parts = [self._all]
        total = sum(_bytes_of(parameters[at]) for at in trained)
        if not in_one and (total > SMALL_BYTES or len(trained) > SMALL_COUNT):
            self._parts = [Part(parameters, stretches) for stretches in self._divided(trained, total)]
        self.count = len(self._parts)
        self.part_of: dict[int, list[int]] = {}
        for number, part in enumerate(self._parts):
            for stretch in part.stretches:
                self.part_of.setdefault(stretch.position, []).append(number)

    def __getitem__(self, number: int | None) -> Part:
        """The part of this number; None stands for all weights."""
        return self._all if number is None else self._parts[number]

    def _divided(self, trained: Sequence[int], total: int) -> list[list[Stretch]]:
        parts: list[list[Stretch]] = [[]]
        filled, limit, count = 0, -(-total // PARTS), max(SMALL_COUNT // 2, -(-len(trained) // PARTS))
        for stretch, size in self._stretches(trained, limit):
            if (filled and filled + size > limit) or len(parts[-1]) >= count:
                parts.append([])
                filled = 0
            parts[-1].append(stretch)
            filled += size
        return parts

    def _stretches(self, trained: Sequence[int], limit: int) -> Iterator[tuple[Stretch, int]]:
        """The weights and their bytes, those that are larger than a part in stretches."""
        for at in trained:
            item = self._parameters[at]
            size, element = _bytes_of(item), item.tensor.element_size()
            if size <= limit or item.slice is not None or not is_plain(item.tensor) or not item.tensor.is_contiguous():
                yield Stretch(at), size
                continue
            step, numel = max(1, limit // element), item.tensor.numel()
            for start in range(0, numel, step):
                stop = min(start + step, numel)
                yield Stretch(at, start, stop), (stop - start) * element


def held(item: NamedTensor) -> torch.Tensor:
    """Returns this rank's part of a weight; of a DTensor without its place in the whole, which takes longer."""
    is_plain_parameter = type(item.tensor) is nn.Parameter  # asking it for an attribute it lacks takes longest
    local: torch.Tensor | None = None if is_plain_parameter else getattr(item.tensor, "_local_tensor", None)
    return item.held()[0] if local is None else local


def _bytes_of(item: NamedTensor) -> int:
    return math.prod(item.whole_shape) * item.tensor.element_size()
