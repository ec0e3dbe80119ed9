"""A patch of module-level functions that all guards of a process share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class SharedPatch(Generic[T]):
    """Replaces functions while they are observed: once, however many observers there are, until the last has left.

    A replacement that other code has kept, or wrapped, passes calls on when nobody observes any more. It is a plain
    function with the name of the original, so that it is pickled by name, as the original is.

    Args:
        places: Owners and names under which a function may be called. A name that an owner lacks is left out.
        replacement: Called as `replacement(observers, original, *args, **kwargs)`, with at least one observer.
        prepare: Given each replacement, returns what is put in place of the original.
    """

    def __init__(
        self,
        places: Sequence[tuple[Any, str]],
        replacement: Callable[..., Any],
        prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        self._places = places
        self._replacement = replacement
        self._prepare = prepare
        self._observers: WeakKeyDictionary[Any, None] = WeakKeyDictionary()
        self._originals: list[tuple[Any, str, Any, Any]] = []
        self._generation = 0  # of the functions in place: older ones pass calls on

    def add(self, observer: T) -> None:
        """Makes an observer see the calls from now on."""
        if not self._observers:
            self._restore()  # after observers that nobody has stopped
            self._install()
        self._observers[observer] = None

    def discard(self, observer: T) -> None:
        """Makes an observer see no more calls."""
        self._observers.pop(observer, None)
        if not self._observers:
            self._restore()

    def _install(self) -> None:
        made: dict[int, Callable[..., Any]] = {}  # a function with two names stays one function
        for owner, name in self._places:
            original = getattr(owner, name, None)
            if original is None:
                continue
            function = made.setdefault(id(original), self._prepare(self._wrapped(original)))
            self._originals.append((owner, name, original, function))
            setattr(owner, name, function)

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        generation = self._generation

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            observers = list(self._observers) if generation == self._generation else None
            if not observers:
                return original(*args, **kwargs)
            return self._replacement(observers, original, *args, **kwargs)

        return call

    def _restore(self) -> None:
        self._generation += 1
        for owner, name, original, function in self._originals:
            if getattr(owner, name, None) is function:  # else wrapped again by other code
                setattr(owner, name, original)
        self._originals.clear()
