"""The module that is being called, and the one in whose call an autograd node was made."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn


class ModuleCall(NamedTuple):
    """A call of a module.

    Attributes:
        name: Fully qualified name; "" for the model itself.
        cls: Class of the module.
        call: Number of its earlier calls.
    """

    name: str
    cls: str
    call: int


class ModuleCalls:
    """Hooks on a model's modules that tell which of them is being called.

    Autograd numbers its nodes in the order in which a forward pass makes them, so that the module of a node is the one
    that was being called when its number was given.

    Args:
        modules: The modules, with their names.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._stack: list[ModuleCall] = []
        self._times: Counter[str] = Counter()
        self._begins: list[int] = []  # numbers of nodes
        self._calls: list[ModuleCall | None] = []  # the innermost call from that number on
        self._handles: list[Any] = []
        for name, module in modules:
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name), always_call=True))

    @property
    def current(self) -> ModuleCall | None:
        """The innermost call under way; None outside of the model's call."""
        return self._stack[-1] if self._stack else None

    def of_node(self, number: int) -> ModuleCall | None:
        """Returns the call in which autograd made the node of that number; None outside of the model's call."""
        at = bisect.bisect_right(self._begins, number) - 1
        return self._calls[at] if at >= 0 else None

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(self, name: str, module: nn.Module) -> None:
        """Begins a call of a module, as its hook does."""
        self._stack.append(ModuleCall(name, type(module).__name__, self._times[name]))
        self._times[name] += 1
        self._note()

    def leave(self, name: str) -> None:
        """Ends a call of a module."""
        # A call whose own hooks have raised never comes here: what is above this one is over too.
        while self._stack and self._stack.pop().name != name:
            pass
        self._note()

    def _before(self, name: str) -> Callable[..., None]:
        return lambda module, _: self.enter(name, module)

    def _after(self, name: str) -> Callable[..., None]:
        return lambda *_: self.leave(name)

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._begins and number < self._begins[-1]:  # numbers are those of a thread
            return
        self._begins.append(number)
        self._calls.append(self.current)
