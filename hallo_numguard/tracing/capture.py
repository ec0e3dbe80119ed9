"""Captures one call of one module in a pass, with all that repeats it elsewhere."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hallo_numguard.tracing.nested import Contents, floating_tensors_in
from hallo_numguard.tracing.rerun import undisturbed
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState

MAX_ATTRIBUTE_BYTES = 1 << 20  # of a module's attributes other than tensors
_OWN_STATE = frozenset(nn.Module().__dict__) - {"training"}  # hooks, parameters, buffers, modules


class NotCaptured(Exception):
    """The call could not be captured; the text says why."""


@dataclass
class Captured:
    """A captured call of a module.

    Attributes:
        module: Copy of the module on the CPU, without hooks or framework, with the weights that the call used.
        args, kwargs: Arguments of the call, on the CPU.
        autocast: Dtype of `torch.autocast` in the call, "" if it was off.
        random: States of torch's generators before the call, by device.
        grad_outputs: Gradients with respect to its floating-point outputs, in order; None where none arrived.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: str
    random: dict[str, torch.Tensor]
    grad_outputs: list[torch.Tensor | None] = field(default_factory=list)


def capture(
    root: nn.Module,
    name: str,
    number: int,
    call: Callable[[], Any],
    seeds: dict[int, torch.Tensor],
    arguments: Contents | None = None,
) -> Captured:
    """Runs a pass again, and captures one call of one module.

    Args:
        root: The model.
        name: Name of the module in `root.named_modules`.
        number: Number of earlier calls of the module in this pass.
        call: Repeats the model's call, with the same random state.
        seeds: Gradients with respect to the model's outputs, by position; without them there is no backward pass.
        arguments: Contents of the model's arguments.

    Raises:
        NotCaptured: If the module had fewer calls, or some of its weights were not at hand.
    """
    capturing = _CallCapture(root.get_submodule(name), number)
    with undisturbed(root, arguments):
        try:
            made = [tensor for _, tensor in floating_tensors_in("output", call())]
            gradients = capturing.gradients(made, seeds)
        finally:
            capturing.stop()
    captured = capturing.result()
    captured.grad_outputs = gradients
    return captured


class _CallCapture:
    """Hooks that capture the call. They never raise: other ranks may be in the middle of the same pass."""

    def __init__(self, module: nn.Module, number: int) -> None:
        self._module = module
        self._left = number
        self._open = False
        self._failure_reason = "the module was not called so often"
        self._called: tuple[Any, ...] | None = None
        self._outputs: Sequence[torch.Tensor] = ()
        self._weights: dict[int, torch.Tensor] = {}  # by the id of the parameter or buffer
        self._handles: list[Any] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]
        # Where weights are gathered module by module (ZeRO stage 3), an inner module has its own only while it runs.
        self._handles += [inner.register_forward_pre_hook(self._inner) for inner in module.modules()]

    def stop(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()

    def result(self) -> Captured:
        """Returns the captured call.

        Raises:
            NotCaptured: If there is none.
        """
        if self._called is None:
            raise NotCaptured(self._failure_reason)
        return Captured(_plain(self._module, self._weights), *self._called)

    def gradients(self, made: Sequence[torch.Tensor], seeds: Mapping[int, torch.Tensor]) -> list[torch.Tensor | None]:
        """Goes backward from the model's outputs, and returns the gradients of the call's outputs."""
        positions = [position for position in sorted(seeds) if made[position].requires_grad]
        wanted = [output for output in self._outputs if output.requires_grad]
        if not positions or not wanted:
            return [None] * len(self._outputs)
        given = torch.autograd.grad(
            [made[position] for position in positions],
            wanted,
            grad_outputs=[seeds[position] for position in positions],
            allow_unused=True,
        )
        by_output = dict(zip(map(id, wanted), given, strict=True))
        found = [by_output.get(id(output)) for output in self._outputs]
        return [None if gradient is None else _clone_to_cpu(gradient) for gradient in found]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open = self._left == 0
        self._left -= 1
        if self._open:
            try:
                self._take_call(module, args, kwargs)
            except Exception as error:  # noqa: BLE001 - whatever a foreign object raises when it is pickled
                self._failure_reason = f"what the module was called with cannot be pickled: {error}"

    def _inner(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._open:
            self._take_weights(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open:
            self._outputs = [tensor for _, tensor in floating_tensors_in("output", output)]
        self._open = False

    def _take_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for inner in module.modules():
            self._take_weights(inner)
        device = next((t.device.type for _, t in floating_tensors_in("", (args, kwargs))), "cpu")
        state = Autocast.now().name_on(device), RandomState.now().by_device()
        self._called = (*_pickled_copy((args, kwargs)), *state)

    def _take_weights(self, module: nn.Module) -> None:
        for weight in (*module._parameters.values(), *module._buffers.values()):
            if weight is not None and id(weight) not in self._weights and _is_here(weight):
                self._weights[id(weight)] = _clone_to_cpu(weight)


def _is_here(weight: torch.Tensor) -> bool:
    return weight.numel() > 0 or not getattr(weight, "ds_numel", 0)


def _clone_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


def _pickled_copy(value: Any) -> Any:
    """A copy of a picklable value, with its tensors on the CPU."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)  # what was pickled just now


def _plain(module: nn.Module, weights: dict[int, torch.Tensor]) -> nn.Module:
    """A copy with only the module's own tensors, submodules, and other picklable attributes."""
    plain: nn.Module = type(module).__new__(type(module))
    nn.Module.__init__(plain)
    rest = {key: value for key, value in vars(module).items() if key not in _OWN_STATE and _is_small(value)}
    plain.__dict__.update(rest)
    for name, parameter in module._parameters.items():
        plain._parameters[name] = None if parameter is None else _parameter(parameter, weights)
    for name, buffer in module._buffers.items():
        plain._buffers[name] = None if buffer is None else _taken(buffer, weights)
    for name, inner in module._modules.items():
        plain._modules[name] = None if inner is None else _plain(inner, weights)
    return plain


def _parameter(parameter: nn.Parameter, weights: dict[int, torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(_taken(parameter, weights), parameter.requires_grad)


def _taken(weight: torch.Tensor, weights: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(weight) not in weights:
        raise NotCaptured("a weight of the module was not at hand when it was called")
    return weights[id(weight)]


def _is_small(value: Any) -> bool:
    """Whether a value can be kept in a file; frameworks leave closures and references to themselves in modules."""
    try:
        return len(pickle.dumps(value)) <= MAX_ATTRIBUTE_BYTES
    except Exception:  # noqa: BLE001 - whatever a foreign object raises when it is pickled
        return False
