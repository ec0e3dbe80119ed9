"""One call of the model, with all that it takes to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hallo_numguard.tracing.nested import floating_tensors_in, tensors_in
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState


@dataclass(eq=False)
class ModelCall:
    """One forward pass of a training step, with all that it takes to repeat it.

    Attributes:
        args, kwargs: Arguments of the model. References, no copies.
        versions: Version of each tensor argument, which shows changes in place.
        random: State of the random number generators before the call.
        autocast: Settings of torch.autocast in the call.
        outputs: Floating-point tensors that the model returned, detached; None if they were too large to keep.
        seeds: Gradients with respect to the outputs that the backward pass has given so far, by position.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    random: RandomState
    autocast: Autocast
    outputs: list[torch.Tensor] | None = None
    seeds: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        """Records a call. Costs a walk through its arguments, and touches no data."""
        return cls(args, kwargs, _versions(args, kwargs), RandomState.now(), Autocast.now())

    @property
    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self.versions != _versions(self.args, self.kwargs)

    def note_output(self, output: Any) -> None:
        """Records the model's output, and the gradients that will arrive there."""
        self.outputs = []
        for position, (_, tensor) in enumerate(floating_tensors_in("output", output)):
            self.outputs.append(tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(self._seed(position))

    def forget_outputs(self) -> None:
        """Drops the outputs and their gradients: this call can no longer be repeated and compared."""
        self.outputs = None
        self.seeds.clear()

    @property
    def output_bytes(self) -> int:
        """Size of the kept outputs, in bytes; their gradients take as much."""
        return sum(tensor.nbytes for tensor in self.outputs or ())

    def _seed(self, position: int) -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if self.outputs is not None:
                self.seeds[position] = gradient.detach()

        return arrived


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(tensor._version for _, tensor in tensors_in("", (args, kwargs)) if not tensor.is_inference())
