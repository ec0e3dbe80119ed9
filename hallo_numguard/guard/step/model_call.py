"""One call of the model, with all that it takes to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hallo_numguard.guard.containment import contain_failures
from hallo_numguard.tracing.autograd_graph import node_number
from hallo_numguard.tracing.model_state import Snapshot, version_of
from hallo_numguard.tracing.nested import Contents, as_plain, contents_of, is_readable
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState


@dataclass(eq=False)
class SeedCounter:
    """Number of gradients that have arrived at outputs of the model, of all calls so far."""

    count: int = 0


@dataclass(eq=False)
class ModelCall:
    """One forward pass of a training step, with all that it takes to repeat it.

    Attributes:
        args, kwargs: Arguments of the model. References, no copies.
        contents: Tensors in them, named by the model's argument names.
        state: State of the model, beside its parameters, before the call.
        random: State of torch's generators before the call.
        autocast: Settings of torch.autocast in the call.
        outputs: Floating-point tensors that the model returned, detached. None if they are unknown, see `unknown`.
        seeds: Gradients with respect to the outputs that backward passes have given so far, by position.
        output_nodes: Numbers of the autograd nodes of the outputs.
        unknown: Why the call cannot be repeated and compared; "" if it can.
        arrivals: Counter of the gradients that arrive at outputs.
        is_hooked: Whether gradients are waited for at any output.
        copies_seeds: Whether `seeds` are copies: the memory in which they arrive is written to again within the step.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    contents: Contents
    state: Snapshot
    random: RandomState = field(default_factory=RandomState.now)
    autocast: Autocast = field(default_factory=Autocast.now)
    outputs: list[torch.Tensor] | None = None
    seeds: dict[int, torch.Tensor] = field(default_factory=dict)
    output_nodes: list[int] = field(default_factory=list)
    unknown: str = "it is not over"
    arrivals: SeedCounter = field(default_factory=SeedCounter)
    is_hooked: bool = False
    copies_seeds: bool = False
    _versions: list[int] = field(default_factory=list)
    _output_versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._versions = [version_of(tensor) for _, tensor in self.contents.tensors]

    @property
    def changed(self) -> bool:
        """Whether one of its tensors was written to since."""
        return self._versions != [version_of(tensor) for _, tensor in self.contents.tensors]

    @property
    def reason_not_to_repeat(self) -> str:
        """Why the call cannot be repeated and compared; "" if it can."""
        if self.unknown:
            return self.unknown
        if self.changed:
            return "what the model was called with was changed in place after the call"
        if self._output_versions != [version_of(tensor) for tensor in self.outputs or ()]:
            return "what the model returned was changed in place after the call"
        if not self.state.can_be_restored():
            return "the call has changed a buffer that is too large to be kept"
        return ""

    @property
    def nbytes(self) -> int:
        """Size of what lives on for this call, in bytes; gradients of the outputs are counted."""
        held = [tensor for _, tensor in self.contents.tensors if is_readable(tensor)]
        outputs = 2 * sum(tensor.nbytes for tensor in self.outputs or ())
        return sum(tensor.nbytes for tensor in held) + outputs + self.state.nbytes

    def note_output(self, output: Any) -> None:
        """Records the model's output, and the gradients that will arrive there."""
        found = contents_of("output", output)
        self.unknown = _reason_unknown(found)
        if self.unknown:
            return
        tensors = [tensor for _, tensor in found.tensors if is_readable(tensor)]
        self.outputs = [_kept(tensor) for tensor in tensors]
        self.output_nodes = [number for number in map(node_number, tensors) if number is not None]
        self._output_versions = [version_of(tensor) for tensor in self.outputs]
        for position, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(self._seed(position))
                self.is_hooked = True

    def forget(self) -> None:
        """Releases everything: this call can no longer be repeated."""
        self.args, self.kwargs, self.contents, self.state = (), {}, contents_of("", ()), Snapshot(())
        self.outputs, self._versions, self._output_versions = None, [], []
        self.seeds.clear()
        self.unknown = "the calls of this step take too much memory to be kept"

    def _seed(self, position: int) -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            self.arrivals.count += 1
            with contain_failures("record of the batch", "this step will not be run again"):
                self._add_seed(position, gradient)

        return arrived

    def _add_seed(self, position: int, gradient: torch.Tensor) -> None:
        if self.outputs is None:
            return
        if torch.is_grad_enabled():
            # A gradient penalty, for example: what such a pass leads to depends on more than this gradient.
            self.unknown = "a backward pass that builds a graph (create_graph=True) went through the model"
            return
        before = self.seeds.get(position)
        gradient = as_plain(gradient).clone() if self.copies_seeds else as_plain(gradient)
        self.seeds[position] = gradient if before is None else before + gradient


def _kept(output: torch.Tensor) -> torch.Tensor:
    """The output; a copy if it is a single number, as training loops divide the loss in place."""
    plain = as_plain(output)
    return plain.clone() if plain.numel() == 1 else plain


def _reason_unknown(found: Contents) -> str:
    if found.opaque:
        return f"the model's output cannot be looked through: {found.opaque[0]}"
    numbers = [(name, tensor) for name, tensor in found.tensors if tensor.is_floating_point() or tensor.is_complex()]
    unreadable = [name for name, tensor in numbers if not is_readable(tensor)]
    if unreadable:
        return f"{unreadable[0]} is of a kind of tensor that cannot be read"
    return "" if numbers else "the model returns no floating-point tensor"
