"""What the model was called with in this step: references, no copies, to be looked at after an overflow."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hallo_numguard.monitor.attribution import NamedTensor, bad_positions, look, only_negative_infinity
from hallo_numguard.monitor.layout import Sums
from hallo_numguard.records import Offender
from hallo_numguard.structure import floating_tensors_in, tensors_in

_LONGEST_NAME = 512
_MOST_CALLS = 64  # of a step; forward passes that no step follows must not pile up


@dataclass(frozen=True)
class Call:
    """One forward pass of a training step.

    Attributes:
        args, kwargs: What the model was called with.
        versions: Of the tensors in it, to know one that was changed in place afterwards.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Takes note of a call. Costs a walk through its arguments, and touches no data."""
        return cls(args, kwargs, _versions(args, kwargs))

    @property
    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self.versions != _versions(self.args, self.kwargs)


class Batch:
    """The calls of one step, in order: one a micro-batch.

    Args:
        model: Whose arguments they are.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._names = _argument_names(model)
        self._calls: deque[Call] = deque(maxlen=_MOST_CALLS)
        self._legal: set[str] = set()

    @property
    def calls(self) -> Sequence[Call]:
        """What is kept."""
        return self._calls

    @property
    def seen(self) -> bool:
        """Whether there is anything to look at, as it was when the model saw it."""
        return bool(self._calls) and not any(call.changed for call in self._calls)

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the arguments of a forward pass, if it is one of training."""
        if torch.is_grad_enabled():
            self._calls.append(Call.of(args, kwargs))

    def clear(self) -> None:
        """Lets go of them: the step is over."""
        self._calls.clear()

    def tensors(self, micro_batch: int) -> list[NamedTensor]:
        """Returns the floating-point tensors of a call, named by the model's own argument names."""
        call = self._calls[micro_batch]
        named = [*zip(self._names, call.args, strict=False), *call.kwargs.items()]
        named += [(f"input {place}", value) for place, value in enumerate(call.args) if place >= len(self._names)]
        found = (item for name, value in named for item in floating_tensors_in(name, value))
        return [NamedTensor("input", name[:_LONGEST_NAME], tensor.detach()) for name, tensor in found]

    def allow(self, names: Sequence[str]) -> None:
        """Takes note of inputs that were not finite in a step that was: they are meant to be so."""
        self._legal.update(names)

    def first_nonfinite(self, rank: int, losses: Sequence[bool]) -> tuple[Offender, int] | None:
        """Finds the first input that may have made a loss non-finite, and the micro-batch that it was in.

        Entries of -Inf alone are how masks are written, and what clean steps had as well is not to blame.

        Args:
            rank: This one.
            losses: Of each micro-batch, whether its loss was finite; of no matter if there are not as many as calls.
        """
        for micro_batch in range(len(self._calls)):
            if len(losses) == len(self._calls) and losses[micro_batch]:
                continue
            tensors = self.tensors(micro_batch)
            sums = look(tensors)
            for position in bad_positions(sums):
                if tensors[position].name not in self._legal and not only_negative_infinity(sums, position):
                    return tensors[position].offender(sums, position, rank), micro_batch
        return None

    def ranges(self) -> tuple[list[str], Sums]:
        """Reads the last call's tensors once: their names, and what they hold."""
        tensors = self.tensors(len(self._calls) - 1) if self._calls else []
        return [item.name for item in tensors], look(tensors)


def _argument_names(model: nn.Module | None) -> list[str]:
    """Of the model's positional arguments; nothing where they cannot be told."""
    try:
        parameters = inspect.signature(model.forward).parameters.values() if model is not None else ()
    except (TypeError, ValueError):
        return []
    return [item.name for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(tensor._version for _, tensor in tensors_in("", (args, kwargs)) if not tensor.is_inference())
