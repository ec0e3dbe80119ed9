"""What the model was called with in this step: references, no copies, to be looked at after an overflow."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import clip
from hallo_numguard.guard.named_tensors import NamedTensor, bad_positions, look, only_negative_infinity
from hallo_numguard.guard.parameter_stats import Sums
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.nested import floating_tensors_in, tensors_in
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState

_LONGEST_NAME = 1000  # bytes
_MOST_OUTPUT_BYTES = 1 << 30  # of a step
_MOST_CALLS = 64  # of a step; forward passes that no step follows must not pile up


@dataclass(eq=False)
class Call:
    """One forward pass of a training step, with what it takes to make it again.

    Attributes:
        args, kwargs: What the model was called with.
        versions: Of the tensors in it, to know one that was changed in place afterwards.
        random: The state of the random number generators before it.
        autocast: What torch.autocast did in it.
        outputs: The floating-point tensors that the model returned, detached; None if they were too large to keep.
        seeds: The gradients with respect to these, as far as the backward pass has given them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    random: RandomState
    autocast: Autocast
    outputs: list[torch.Tensor] | None = None
    seeds: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Takes note of a call. Costs a walk through its arguments, and touches no data."""
        return cls(args, kwargs, _versions(args, kwargs), RandomState.now(), Autocast.now())

    @property
    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self.versions != _versions(self.args, self.kwargs)

    def returned(self, output: Any) -> None:
        """Takes note of what the model returned, and of the gradients that will arrive there."""
        self.outputs = []
        for position, (_, tensor) in enumerate(floating_tensors_in("output", output)):
            self.outputs.append(tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(self._seed(position))

    def forget_outputs(self) -> None:
        """Lets go of what takes room: this call can no longer be made again and compared."""
        self.outputs = None
        self.seeds.clear()

    @property
    def output_bytes(self) -> int:
        """What is kept of outputs; their gradients take as much."""
        return sum(tensor.nbytes for tensor in self.outputs or ())

    def _seed(self, position: int) -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if self.outputs is not None:
                self.seeds[position] = gradient.detach()

        return arrived


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

    def returned(self, output: Any) -> None:
        """Takes note of what the last of them returned; the oldest are let go of where that takes too much room."""
        if not torch.is_grad_enabled() or not self._calls:
            return
        self._calls[-1].returned(output)
        room = _MOST_OUTPUT_BYTES
        for call in reversed(self._calls):
            room -= call.output_bytes
            if room < 0:
                call.forget_outputs()

    def exchange(self, calls: Sequence[Call]) -> Sequence[Call]:
        """Goes on with the calls of another step; returns those of this one."""
        before, self._calls = self._calls, deque(calls, _MOST_CALLS)
        return before

    def clear(self) -> None:
        """Lets go of them: the step is over."""
        self._calls.clear()

    def tensors(self, micro_batch: int) -> list[NamedTensor]:
        """Returns the floating-point tensors of a call, named by the model's own argument names."""
        call = self._calls[micro_batch]
        named = [*zip(self._names, call.args, strict=False), *call.kwargs.items()]
        named += [(f"input {place}", value) for place, value in enumerate(call.args) if place >= len(self._names)]
        found = (item for name, value in named for item in floating_tensors_in(name, value))
        return [NamedTensor("input", clip(name, _LONGEST_NAME), tensor.detach()) for name, tensor in found]

    def in_place_of_losses(self) -> list[torch.Tensor]:
        """Returns a number a call, for a loss that nobody showed: NaN if the model returned what is not finite, else 0.

        Nothing if that cannot be told of one of them. -Inf alone is how logits are masked.
        """
        if any(call.outputs is None for call in self._calls):
            return []
        return [_as_number(call.outputs or ()) for call in self._calls]

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


def _as_number(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    table = multi_tensor_stats(outputs)
    return torch.where((table.nan + table.pos_inf).sum() > 0, torch.nan, 0.0)


def _argument_names(model: nn.Module | None) -> list[str]:
    """Of the model's positional arguments; nothing where they cannot be told."""
    try:
        parameters = inspect.signature(model.forward).parameters.values() if model is not None else ()
    except (TypeError, ValueError):
        return []
    return [item.name for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(tensor._version for _, tensor in tensors_in("", (args, kwargs)) if not tensor.is_inference())
