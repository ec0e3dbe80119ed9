"""One call of a function that makes a training step's loss, with all that it takes to repeat it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hallo_numguard.tracing.model_state import version_of
from hallo_numguard.tracing.nested import Contents, as_plain, contents_of_items
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState


@dataclass(eq=False)
class StepCall:
    """A call of a step function.

    Attributes:
        function: The function.
        args, kwargs: Its arguments. References, but for lists and dicts, of which the function may take things out.
        contents: Tensors in them, named by their place.
        first_call: Number of the step's calls of the model before it, kept or not.
        random: State of torch's generators before the call.
        autocast: Settings of torch.autocast in the call.
        loss: The loss that it returned, detached; None if it has returned none.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    contents: Contents
    first_call: int
    random: RandomState = field(default_factory=RandomState.now)
    autocast: Autocast = field(default_factory=Autocast.now)
    loss: torch.Tensor | None = None
    _versions: list[int] = field(default_factory=list)

    @classmethod
    def begin(
        cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], first_call: int
    ) -> StepCall:
        """Returns a call that is about to be made."""
        named = _named(function, args, kwargs)
        args, kwargs = tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}
        call = cls(function, args, kwargs, contents_of_items(named), first_call)
        call._versions = call._versions_now()
        return call

    def end(self, result: Any) -> None:
        """Records what it has returned: the loss, or a tuple or dict that begins with it."""
        loss = loss_of(result)
        self.loss = None if loss is None else as_plain(loss).clone()

    @property
    def reason_not_to_repeat(self) -> str:
        """Why the call cannot be repeated and compared; "" if it can."""
        if self.loss is None:
            return "the step function has returned no loss"
        if self._versions != self._versions_now():
            return "what the step function was called with was changed in place"
        return ""

    def repeat(self) -> torch.Tensor | None:
        """Calls the function once more, and returns its loss."""
        args, kwargs = map(_kept, self.args), {name: _kept(value) for name, value in self.kwargs.items()}
        return loss_of(self.function(*args, **kwargs))

    def _versions_now(self) -> list[int]:
        return [version_of(tensor) for _, tensor in self.contents.tensors]


def loss_of(result: Any) -> torch.Tensor | None:
    """Returns the loss in what a step function has returned: itself, the first of a tuple, or what is called so."""
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    elif isinstance(result, Mapping):
        result = result.get("loss")
    elif not isinstance(result, torch.Tensor):
        result = getattr(result, "loss", None)
    return result if isinstance(result, torch.Tensor) and result.numel() == 1 else None


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arguments with the names that the function has for them."""
    try:
        return list(inspect.signature(function).bind(*args, **kwargs).arguments.items())
    except (TypeError, ValueError):
        return [*((f"argument {place}", value) for place, value in enumerate(args)), *kwargs.items()]


def _kept(value: Any) -> Any:
    """A shallow copy of a list or dict, the value itself otherwise."""
    return copy.copy(value) if isinstance(value, (MutableMapping, MutableSequence)) else value
