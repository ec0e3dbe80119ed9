"""Temporary replacements of methods of instances."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any


class MethodPatches:
    """Replaces methods of instances, and puts them back.

    Attributes:
        active: Whether the replacements run; else they only pass calls on.
    """

    def __init__(self) -> None:
        self.active = True
        self._placed: list[_Patch] = []

    def wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Makes `replacement(original, *args, **kwargs)` run in place of `owner.name(*args, **kwargs)`."""
        patch = _Patch(self, owner, name, replacement)
        setattr(owner, name, patch)
        self._placed.append(patch)

    def observe(
        self,
        owner: Any,
        name: str,
        before: Callable[..., Any] | None = None,
        after: Callable[[Any], Any] | None = None,
    ) -> None:
        """Makes `before(*args, **kwargs)` run before `owner.name`, and `after(result)` after it. Neither may raise."""

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                after(result)
            return result

        self.wrap(owner, name, run)

    def restore(self) -> None:
        """Puts every method back."""
        self.active = False
        while self._placed:
            self._placed.pop().remove()


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Makes `replacement(*args, **kwargs)` run in place of `owner.name` inside."""
    patches = MethodPatches()
    patches.wrap(owner, name, lambda _, *args, **kwargs: replacement(*args, **kwargs))
    try:
        yield
    finally:
        patches.restore()


class _Patch:
    """A replacement of a method. A copy or pickle of its owner has the method itself, and nothing of ours.

    Args:
        patches: Decides whether the replacement runs.
        owner, name, replacement: See `MethodPatches.wrap`.
    """

    def __init__(self, patches: MethodPatches, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)  # learning-rate schedulers look at attributes of step
        self._patches = patches
        self._owner = owner
        self._name = name
        self._replacement = replacement
        self._original = original
        self._before = vars(owner).get(name)  # None if the method is the class's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._patches.active:
            return self._original(*args, **kwargs)
        return self._replacement(self._original, *args, **kwargs)

    def remove(self) -> None:
        """Puts back what was there before, also from below other patches.

        Where other code has wrapped this patch, it stays, and passes calls on.
        """
        above = vars(self._owner).get(self._name)
        if above is self:
            if self._before is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._before)
            return
        while isinstance(above, _Patch):
            if above._before is self:
                above._before, above._original = self._before, self._original
                functools.update_wrapper(above, self._original, updated=())
                return
            above = above._before

    def __reduce__(self) -> tuple[Any, ...]:
        # While the copy of the owner is built, it has no attributes yet but those of its class.
        return (getattr, (self._owner, self._name)) if self._before is None else (copy.copy, (self._original,))
