"""An optimizer's gradients and state on this rank, and the piece of a parameter that each tensor is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.parameter_stats import PADDING, Piece
from hallo_numguard.integrations.torch_optim.sharding import counts_here, is_sharded, local, place_of
from hallo_numguard.ops.api import multi_tensor_stats

Positions = Mapping[torch.Tensor, int]
"""Position in the guard's list, by parameter."""


@dataclass(frozen=True)
class GradientScan:
    """One pass over this rank's gradients.

    Attributes:
        pieces: Statistics, with the piece of a parameter behind each row.
        owned: Gradients that count when ranks add up; None for all. bool [gradients].
    """

    pieces: ScannedPieces
    owned: torch.Tensor | None

    def totals(self) -> torch.Tensor:
        """Returns the number of bad gradients, and the sum of the squares of all: float64 [2], without a host sync."""
        table = self.pieces.table
        squares = table.sumsq if self.owned is None else table.sumsq * self.owned
        return torch.stack([(table.first_nonfinite >= 0).sum(dtype=torch.float64), squares.sum()])


class Gradients:
    """`parameter.grad` of all parameters that an optimizer trains.

    Args:
        optimizer: Optimizer that trains them.
        parameters: Parameters in the guard's order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[NamedTensor]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._positions = {item.tensor: position for position, item in enumerate(parameters)}
        self._held: list[torch.Tensor] = []  # parameters that had a gradient
        self._pieces: list[Piece] = []
        self._owned: torch.Tensor | None = None
        self.sharded = any(is_sharded(item.tensor) for item in parameters)

    def collect(self) -> list[torch.Tensor]:
        """Returns this rank's part of the gradients of the last backward passes. Reads no values.

        Raises:
            InvalidInput: If one is sparse.
        """
        held = [parameter for parameter in self._all() if parameter.grad is not None]
        if list(map(id, held)) != list(map(id, self._held)):
            self._remember(held)
        gradients = [parameter.grad for parameter in held if parameter.grad is not None]
        return [local(gradient) for gradient in gradients] if self.sharded else gradients

    def read(self, gradients: list[torch.Tensor]) -> GradientScan:
        """Reads the gradients just collected, once. No host sync."""
        return GradientScan(ScannedPieces(multi_tensor_stats(gradients), self._pieces), self._owned)

    def scan_state(self) -> ScannedPieces:
        """Reads the optimizer's moments once, one row per parameter and tensor. Not for the hot path."""
        parts = list(_parts(self._optimizer, self._positions))
        table = multi_tensor_stats([tensor for tensor, _ in parts])
        return ScannedPieces(table, [self._piece(parameter) for _, parameter in parts])

    def trained(self) -> list[tuple[str, torch.Tensor]]:
        """Returns the optimizer's parameters and their names."""
        return [(self._parameters[self._positions[parameter]].name, parameter) for parameter in self._all()]

    def all_named(self) -> bool:
        """Returns whether every parameter of the optimizer is in the guard's list."""
        return all(parameter in self._positions for parameter in self._all())

    def _all(self) -> Iterator[torch.Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self._optimizer.param_groups)

    def _remember(self, held: list[torch.Tensor]) -> None:
        for parameter in held:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                name = self._parameters[self._positions[parameter]].name
                raise InvalidInput(
                    f"the gradient of {name} is sparse, which the guard cannot read: make the embedding with "
                    "sparse=False, or give its weights an optimizer of their own that is not guarded"
                )
        self._held = held
        self._pieces = [self._piece(parameter) for parameter in held]
        if self.sharded and held:
            owned = [piece is not PADDING for piece in self._pieces]
            self._owned = torch.tensor(owned, device=local(held[0]).device)

    def _piece(self, parameter: torch.Tensor) -> Piece:
        if self.sharded and not counts_here(parameter):
            return PADDING
        return Piece(self._positions[parameter], *place_of(parameter))


def moments_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors of an optimizer's state that are as large as the parameter; a step count is not."""
    return [
        value
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
    ]


def _parts(optimizer: torch.optim.Optimizer, positions: Positions) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if parameter in positions:
            for moment in moments_of(optimizer, parameter):
                yield local(moment).detach(), parameter
