"""Temporary replacements of methods of instances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class MethodPatches:
    """Replaces methods of instances, and puts them back."""

    def __init__(self) -> None:
        self._active = True
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Makes `replacement(original, *args, **kwargs)` run in place of `owner.name(*args, **kwargs)`."""
        original = getattr(owner, name)

        @functools.wraps(original)  # learning-rate schedulers look at attributes of step
        def patch(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        original_attribute = vars(owner).get(name)

        def undo() -> None:
            if vars(owner).get(name) is not patch:
                return  # wrapped again by other code: this patch now only passes calls on
            if original_attribute is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original_attribute)

        setattr(owner, name, patch)
        self._undo.append(undo)

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
        self._active = False
        while self._undo:
            self._undo.pop()()
