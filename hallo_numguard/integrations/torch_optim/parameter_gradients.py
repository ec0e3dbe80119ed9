"""An optimizer's gradients and state on this rank, and the piece of a parameter that each tensor is."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hallo_numguard.guard import readable
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import PADDING, Piece
from hallo_numguard.guard.readable import Reader, UncheckedTensors, is_plain
from hallo_numguard.guard.state_tensors import state_piece, state_tensors
from hallo_numguard.integrations.torch_optim.sharding import counts_here, is_sharded, local, place_of
from hallo_numguard.ops.table import StatsTable

Positions = Mapping[torch.Tensor, int]
"""Position in the guard's list, by parameter."""


@dataclass(frozen=True)
class GradientScan:
    """One pass over this rank's gradients.

    Attributes:
        pieces: Statistics, with the piece of a parameter behind each row.
        owned: Rows that count when ranks add up; None for all. bool [rows].
        unread: Norms of the gradients that have no row. 0-dim float64 each.
    """

    pieces: ScannedPieces
    owned: torch.Tensor | None
    unread: Sequence[torch.Tensor] = ()

    def totals(self) -> torch.Tensor:
        """Returns the number of bad gradients, and the sum of the squares of all: float64 [2], without a host sync."""
        table = self.pieces.table
        squares = table.sumsq if self.owned is None else table.sumsq * self.owned
        totals = torch.stack([(table.first_nonfinite >= 0).sum(dtype=torch.float64), squares.sum()])
        for norm in self.unread:
            totals += totals_of(norm.to(totals.device))
        return totals

    def figures(self) -> torch.Tensor:
        """Returns the figures of all gradients, as in `figure_exchange.PART`: float64 [4], without a host sync."""
        table = self.pieces.table
        counts, absmax = table.nonfinite_counts, table.absmax
        if self.owned is not None:
            counts, absmax = counts * self.owned[:, None], absmax * self.owned
        nan, pos_inf, neg_inf = counts.sum(dim=0).to(torch.float64).unbind()
        largest = absmax.amax() if len(table) else torch.zeros_like(nan)
        return torch.stack([nan, pos_inf + neg_inf, largest, self.totals()[1]])


class Gradients:
    """`parameter.grad` of all parameters that an optimizer trains.

    Args:
        optimizer: Optimizer that trains them.
        parameters: Parameters in the guard's order. Others may follow later: see `parameters_were_added`.
        unchecked: Takes the gradients and state tensors inside of which nothing can be read.

    Attributes:
        sharded: Whether the parameters are DTensors.
        has_unknown: Whether the gradients just collected are in part of parameters that are not in the guard's list.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[NamedTensor], unchecked: UncheckedTensors
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._unchecked = unchecked
        self._positions: dict[torch.Tensor, int] = {}
        self._held: list[torch.Tensor] = []  # parameters that had a gradient
        self.has_unknown = False
        self._reader = Reader()
        self._pieces: list[Piece] = []
        self._owned: torch.Tensor | None = None
        self.parameters_were_added()
        self.sharded = any(is_sharded(item.tensor) for item in parameters)

    def parameters_were_added(self) -> None:
        """Takes the parameters that follow the known ones in the guard's list."""
        self._positions = {item.tensor: position for position, item in enumerate(self._parameters)}
        self._held = []

    def collect(self) -> list[torch.Tensor]:
        """Returns this rank's part of the gradients of the last backward passes. Reads no values."""
        held = list(self.own_parameters())
        found = [parameter.grad for parameter in held]
        gradients = [gradient for gradient in found if gradient is not None]
        if len(gradients) < len(found):
            held = [parameter for parameter, gradient in zip(held, found, strict=True) if gradient is not None]
        if self.sharded:
            gradients = [local(gradient) for gradient in gradients]
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            self._remember(held, gradients)
        return gradients

    def read(self, gradients: list[torch.Tensor]) -> GradientScan:
        """Reads the gradients just collected, once. No host sync, unless one is sparse."""
        found = self._reader.scan(gradients)
        if self._reader.are_plain:
            return GradientScan(ScannedPieces(found.table, self._pieces), self._owned)
        return self._inside(found, gradients)

    def _inside(self, found: readable.Scan, gradients: list[torch.Tensor]) -> GradientScan:
        """The scan of gradients of which not all are plain.

        The norm of a wrapper subclass, or of what cannot be read at all, is torch's.
        """
        rows = dict(zip(reversed(found.owners), reversed(range(len(found.owners))), strict=True))  # the first of each
        for position, row in rows.items():
            if readable.is_wrapper(gradients[position]):
                _set_norm(found.table, row, found.owners.count(position), readable.norm_by_torch(gradients[position]))
        for position in found.unread:
            self._unchecked.add(f"gradient of {self._name(self._held[position])}", gradients[position])
        pieces = [self._pieces[position] for position in found.owners]
        unread = [position for position in found.unread if self._pieces[position] is not PADDING]
        owned = None if self._owned is None else torch.tensor([piece is not PADDING for piece in pieces])
        return GradientScan(
            ScannedPieces(found.table, pieces),
            None if owned is None else owned.to(found.table.packed.device),
            [readable.norm_by_torch(gradients[position]) for position in unread],
        )

    def multiply(self, gradients: list[torch.Tensor], factor: float) -> None:
        """Multiplies the gradients just collected."""
        if self._reader.are_plain and gradients:
            torch._foreach_mul_(gradients, factor)
        else:
            for gradient in gradients:  # of a sparse one the values; a wrapper subclass has its own way
                gradient.mul_(factor)

    def scan_state(self) -> ScannedPieces:
        """Reads the optimizer's moments once, one row per parameter and tensor. Not for the hot path."""
        parts = [part for part in _state_parts(self._optimizer) if part.parameter in self._positions]
        found = readable.scan([part.tensor for part in parts])
        for position in found.unread:
            part = parts[position]
            self._unchecked.add(f"{part.key} of {self._name(part.parameter)}", part.tensor)
        return ScannedPieces(found.table, [self._state_piece(parts[position]) for position in found.owners])

    def trained(self) -> list[tuple[str, torch.Tensor]]:
        """Returns the optimizer's parameters and their names."""
        return [(self._name(parameter), parameter) for parameter in self.own_parameters()]

    def all_named(self) -> bool:
        """Returns whether every parameter of the optimizer is in the guard's list."""
        return all(parameter in self._positions for parameter in self.own_parameters())

    def own_parameters(self) -> Iterator[torch.Tensor]:
        """Yields the optimizer's parameters."""
        return itertools.chain.from_iterable(group["params"] for group in self._optimizer.param_groups)

    def _name(self, parameter: torch.Tensor) -> str:
        position = self._positions.get(parameter)
        return dict(trained(self._optimizer))[parameter] if position is None else self._parameters[position].name

    def _remember(self, held: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        self._held = held
        self._reader.are_plain = all(map(is_plain, gradients))
        self.has_unknown = not all(parameter in self._positions for parameter in held)
        self._pieces = [self._piece(parameter) for parameter in held]
        if self.sharded and held:
            owned = [piece is not PADDING for piece in self._pieces]
            self._owned = torch.tensor(owned, device=local(held[0]).device)

    def _state_piece(self, part: _StatePart) -> Piece:
        piece = self._piece(part.parameter)
        return piece if piece is PADDING else state_piece(piece, local(part.parameter).numel(), part.tensor.numel())

    def _piece(self, parameter: torch.Tensor) -> Piece:
        if parameter not in self._positions or (self.sharded and not counts_here(parameter)):
            return PADDING
        return Piece(self._positions[parameter], *place_of(parameter))


class _StatePart(NamedTuple):
    """A tensor of an optimizer's state, and the parameter that it belongs to."""

    key: str
    tensor: torch.Tensor
    parameter: torch.Tensor


def _state_parts(optimizer: torch.optim.Optimizer) -> Iterator[_StatePart]:
    for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        for key, tensor in state_tensors(optimizer, parameter):
            yield _StatePart(key, local(tensor), parameter)


def trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, str]]:
    """Yields the optimizer's parameters and their names: `param_names` of a group, or places in the groups."""
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"param_groups[{number}][{at}]" for at in range(len(group["params"]))]
        yield from zip(group["params"], names, strict=False)


def steps_seen(optimizer: torch.optim.Optimizer) -> int | None:
    """Returns the number of steps that an optimizer's state has seen; None if it does not say. Synchronises."""
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state, Mapping) and "step" in state]
    numbers = [count for count in counts if isinstance(count, (int, float)) or _is_number(count)]
    return max((int(local(number)) for number in numbers), default=None)


def _is_number(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type != "meta"


def totals_of(norm: torch.Tensor) -> torch.Tensor:
    """Returns what `GradientScan.totals` counts, for one gradient of that norm."""
    return torch.stack([(~norm.isfinite()).to(torch.float64), norm.square()])


def _set_norm(table: StatsTable, row: int, rows: int, norm: torch.Tensor) -> None:
    """Gives a tensor of several rows a norm that is not that of the numbers read."""
    table.sumsq[row : row + rows] = 0.0
    table.sumsq[row] = norm.square().nan_to_num(0.0, 0.0, 0.0)
