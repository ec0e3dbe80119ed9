"""Ways in which DeepSpeed's optimizers store reduced gradients, shared by their adapters.

A source is made once. On a clean step, a scan of flat buffers does no work per parameter.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from hallo_numguard.core.errors import UnsupportedDeepSpeed
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.parameter_stats import PADDING, Piece
from hallo_numguard.guard.readable import Reader
from hallo_numguard.integrations.deepspeed.version import unknown_layout
from hallo_numguard.ops.api import tensor_stats
from hallo_numguard.ops.layout import Layout
from hallo_numguard.ops.table import StatsTable

Segment = tuple[int, int, Piece]
"""Begin and end inside a flat tensor, and the piece of a parameter between them."""

Positions = dict[torch.Tensor, int]
"""Position in the guard's list, by parameter."""


class GradientSource(Protocol):
    """This rank's reduced gradients.

    Attributes:
        is_sliced: Whether the ranks hold slices; else every rank holds all of them.
        has_unknown: Whether the gradients just read are in part of parameters that are not in the guard's list.
    """

    is_sliced: bool
    has_unknown: bool

    def scan(self) -> ScannedPieces:
        """Reads the gradients once, between the last backward of a step and the optimizer's step."""

    def drop(self) -> None:
        """Forgets the gradients of a step that was skipped.

        Otherwise buffers keep the gradient of a parameter that takes no part in the next step, and apply it there: a
        NaN of the skipped step reaches the weights with a finite loss (ZeRO 1 to 3 with offload), or every later step
        is skipped as well (ZeRO 3).
        """


class ParameterGradients:
    """`parameter.grad`, averaged over the ranks: stage 0.

    Args:
        groups: Returns the optimizer's parameters, by group.
        positions: Position in the guard's list, by parameter. The optimizer may get others later.
    """

    is_sliced = False
    has_unknown = False

    def __init__(self, groups: Callable[[], Iterable[Sequence[torch.Tensor]]], positions: Positions) -> None:
        self._groups = groups
        self._positions = positions
        self._reader = Reader()
        self._known: tuple[list[torch.Tensor], Sequence[int]] = [], ()  # parameters with gradients, owners of the rows
        self._pieces: list[Piece] = []

    def scan(self) -> ScannedPieces:
        """Reads the gradients that exist; sparse ones by their values."""
        parameters, gradients = self._listed()
        found = self._reader.scan(gradients)
        if self.has_unknown or not self._are_known(parameters, found.owners):
            self._pieces = [self._piece(parameters[owner]) for owner in found.owners]
            self._known = parameters, found.owners
            self.has_unknown = PADDING in self._pieces
        return ScannedPieces(found.table, self._pieces)

    def _listed(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters with gradients, and these."""
        parameters = list(itertools.chain.from_iterable(self._groups()))
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        if len(gradients) < len(parameters):
            parameters = [parameter for parameter in parameters if parameter.grad is not None]
        return parameters, gradients

    def _are_known(self, parameters: Sequence[torch.Tensor], owners: Sequence[int]) -> bool:
        """Whether these are the parameters of the step before: identity is asked for, as == compares elements."""
        known, known_owners = self._known
        is_as_long = len(parameters) == len(known) and owners == known_owners
        return is_as_long and all(map(operator.is_, parameters, known))

    def _piece(self, parameter: torch.Tensor) -> Piece:
        position = self._positions.get(parameter)
        return PADDING if position is None else Piece(position, 0)

    def drop(self) -> None:
        """Does nothing: the optimizer has set the gradients to None."""


class FlatBuffers:
    """Flat tensors that keep their addresses.

    Args:
        buffers: Getter of each buffer (which may give None in a step) with its segments in order; what lies between
            segments is padding.
        is_sliced: Whether the ranks hold slices of the gradients.
        groups: Number of segments of each of the optimizer's groups, in order. Default: one group per buffer.
        copies: Returns other tensors that hold the same gradients.
        drop_others: Forgets those that are not in memory.
        wait: Waits for copies that are still on their way to the buffers.
    """

    has_unknown = False

    def __init__(
        self,
        buffers: Sequence[tuple[Callable[[], torch.Tensor | None], Sequence[Segment]]],
        is_sliced: bool,
        groups: Sequence[int] | None = None,
        copies: Callable[[], Iterable[torch.Tensor | None]] = tuple,
        drop_others: Callable[[], object] = tuple,
        wait: Callable[[], object] = tuple,
    ) -> None:
        self.is_sliced = is_sliced
        self._wait = wait
        self._copies = copies
        self._drop_others = drop_others
        self._buffers = []
        self._pieces: list[Piece] = []
        ends = [0]
        for get, segments in buffers:
            offsets, pieces, rows = _without_gaps(segments)
            self._buffers.append((get, Layout(offsets)))
            counts = [len(segments)] if groups is None else groups
            at = itertools.accumulate(counts, initial=0)
            ends += [len(self._pieces) + rows[end] for end in itertools.islice(at, 1, None)]
            self._pieces += pieces
        self._groups = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def scan(self) -> ScannedPieces:
        """Waits for copies to the buffers, then reads each buffer once."""
        self._wait()
        tables = []
        for get, layout in self._buffers:
            flat = get()
            if flat is None:  # nothing arrived for this group
                tables.append(StatsTable.empty(layout.segments))
            else:
                tables.append(tensor_stats(flat.view(-1), layout))
        return ScannedPieces(StatsTable.concatenate(tables), self._pieces, self._groups)

    def drop(self) -> None:
        """Sets the buffers and their copies to zero."""
        for flat in [*(get() for get, _ in self._buffers), *self._copies()]:
            if flat is not None:
                flat.zero_()
        self._drop_others()


def check_end(optimizer: Any, attribute: str, segments: Sequence[Segment], numel: int) -> None:
    """Raises UnsupportedDeepSpeed if the segments end beyond the flat tensor that should hold them."""
    end = segments[-1][1] if segments else 0
    if end > numel:
        raise unknown_layout(optimizer, attribute, f"{numel} elements where the parameters account for {end}")


def _without_gaps(segments: Sequence[Segment]) -> tuple[list[int], list[Piece], list[int]]:
    """Offsets with padding as extra segments, the piece of each, and the number of rows before segment i."""
    offsets, pieces, rows = [0], [], [0]
    for begin, end, piece in segments:
        if begin < offsets[-1]:
            raise UnsupportedDeepSpeed(f"gradients that overlap: one begins at {begin}, before {offsets[-1]}")
        if begin > offsets[-1]:
            offsets.append(begin)
            pieces.append(PADDING)
        offsets.append(end)
        pieces.append(piece)
        rows.append(len(pieces))
    return offsets, pieces, rows
