"""Patches that check what a framework is about to save; the rules are in `guard/save_gate.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hallo_numguard.guard.save_gate import Save
from hallo_numguard.guard.session import Session
from hallo_numguard.integrations.patches import MethodPatches


class SaveGates:
    """The checks before all saves of one guarded run.

    Args:
        sessions: Returns the sessions of the run, as they are when it is saved.
        keeper: `CheckpointKeeper` that saves the run; None if there is none.
        is_ours: Returns whether a run that the keeper is given is this one.
    """

    def __init__(
        self,
        sessions: Callable[[], Sequence[Session]],
        keeper: Any = None,
        is_ours: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self._sessions = sessions
        self._is_ours = is_ours
        self._is_on_guard = True
        self._patches = MethodPatches()
        self._of_keeper: list[Any] = getattr(keeper, "save_gates", [])
        self._of_keeper.append(self._keeper_save)

    def add(self, owner: Any, name: str, describe: Callable[..., Save]) -> None:
        """Makes `owner.name` check before it saves; does nothing if there is no such method.

        Args:
            owner: Object with the method.
            name: Name of the method.
            describe: Returns the save that a call of the method begins, from the call's arguments.
        """

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._checked(describe(*args, **kwargs)):
                return original(*args, **kwargs)

        if hasattr(owner, name):
            self._patches.wrap(owner, name, run)

    def leave(self) -> None:
        """Ends the checks of this rank. Where others may still wait for its answer, it answers until all have left."""
        self._is_on_guard = False
        if not any(session.save_gate.has_other_ranks for session in self._sessions()):
            self.remove()

    def remove(self) -> None:
        """Removes the checks. Where there are several ranks, all do."""
        self._patches.restore()
        if self._keeper_save in self._of_keeper:
            self._of_keeper.remove(self._keeper_save)

    def _keeper_save(self, run: Any) -> contextlib.AbstractContextManager[None]:
        if not self._is_ours(run):
            return contextlib.nullcontext()
        return self._checked(Save("CheckpointKeeper.save", on_all_ranks=True))

    @contextlib.contextmanager
    def _checked(self, save: Save) -> Iterator[None]:
        """Context of a save, entered only if nothing bad would be written.

        Raises:
            NumericsError: On all ranks that make the save together, if it is refused.
        """
        sessions = self._sessions()
        # Each may reduce over the ranks, so none is left out when an earlier one refuses.
        for error in [session.check_save(save, self._is_on_guard) for session in sessions]:
            if error is not None:
                raise error
        if not self._is_on_guard and all(session.save_gate.all_left for session in sessions):
            self.remove()
        with contextlib.ExitStack() as stack:
            for session in sessions:
                stack.enter_context(session.save_gate.passed(save))
            yield


def saves_part_of(run: Any, module: nn.Module | None) -> bool:
    """Returns whether a run of plain PyTorch, a dict of objects, has a module with a parameter of `module`."""
    if module is None or not isinstance(run, Mapping):
        return False
    guarded = set(module.parameters())
    parts = [part for part in run.values() if isinstance(part, nn.Module)]
    return any(parameter in guarded for part in parts for parameter in part.parameters())
