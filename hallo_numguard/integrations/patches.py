"""Methods of instances that are replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Seams:
    """Puts our methods in place of others', and takes them away again."""

    def __init__(self) -> None:
        self._active = True
        self._restore: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Lets `replacement(original, *args)` run in place of `owner.name(*args)`."""
        original = getattr(owner, name)

        @functools.wraps(original)  # learning-rate schedulers look at attributes of step
        def seam(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        before = vars(owner).get(name)

        def restore() -> None:
            if vars(owner).get(name) is not seam:
                return  # somebody wrapped it again: ours is now a way through
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, seam)
        self._restore.append(restore)

    def restore(self) -> None:
        """Puts every method back."""
        self._active = False
        while self._restore:
            self._restore.pop()()
