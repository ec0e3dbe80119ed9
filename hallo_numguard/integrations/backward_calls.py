"""The losses of a run: what `backward` is called on, seen by one patch that all guards of the process share.

`Tensor.backward`, and with it every framework's, calls `torch.autograd.backward`, which is patched. No losses are: what
has a gradient of its own (`grad_tensors`), what is no single number, and the roots of a call inside of a backward pass
(reentrant checkpointing) or of a pass that a guard runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo

from hallo_numguard.guard.session import Session
from hallo_numguard.integrations.shared_patch import SharedPatch
from hallo_numguard.tracing.nested import as_plain, is_readable
from hallo_numguard.tracing.rerun import is_rerunning

MAX_NODES = 2000  # of an autograd graph that are searched for a guarded parameter


class LossObserver:
    """Finds out which losses the gradients of one guard come from, and records them.

    A backward pass counts if its gradients have reached what the guarded model returned. Where that cannot be seen, its
    graph is searched for a parameter. A loss that the framework or the script shows before the pass is recorded in
    place of the pass's root, which may be scaled.

    Args:
        session: Session that records the losses.
        trained: Returns the parameters of the guarded optimizer. Not needed where all losses shown are the guard's.
        on_backward: Called before each backward pass. Must not raise.
    """

    def __init__(
        self,
        session: Session,
        trained: Callable[[], Iterable[torch.Tensor]] = tuple,
        on_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self._session = session
        self._trained = trained
        self._on_backward = on_backward
        self._shown: list[torch.Tensor] = []
        self._is_certain = False
        self._steps = 0  # of the guard, so far
        self._before: tuple[int, int] = 0, 0
        self._found: list[torch.Tensor] = []
        _patch.add(self)

    def stop(self) -> None:
        """Sees no more passes."""
        _patch.discard(self)

    def show(self, loss: torch.Tensor, is_certain: bool) -> None:
        """Takes the loss of the backward pass to come, before it was scaled.

        Args:
            loss: The loss.
            is_certain: Whether the pass concerns this guard, whatever it reaches.
        """
        if not is_certain and self._shown and not self._is_certain:
            self._shown.clear()  # of a pass that was not made
        self._shown += _values([loss])
        self._is_certain = is_certain

    def find(self, loss: torch.Tensor) -> None:
        """Takes a loss that the model has returned. It counts if no backward pass is seen before the step."""
        self._found += _values([loss])

    def begin_step(self) -> None:
        """Records what was shown and found in this step, if no backward pass was seen in it."""
        self._steps += 1
        found = self._shown or ([] if self._session.has_losses else self._found)
        for loss in found:
            self._session.on_loss(loss)
        self.forget()

    def forget(self) -> None:
        """Forgets what was shown and found since the last backward pass."""
        self._shown, self._found = [], []

    def before(self) -> None:
        """A backward pass begins."""
        self._on_backward()
        self._before = self._steps, self._session.seeds_seen

    def after(self, roots: Sequence[torch.Tensor], leaves: Leaves) -> None:
        """A backward pass is over.

        Args:
            roots: What it was called on.
            leaves: Those of its graph.
        """
        steps, seeds = self._before
        shown, self._shown = self._shown, []
        if steps != self._steps:  # the optimizer has made its step inside of the pass
            return
        if not (shown and self._is_certain) and not self._is_reached(leaves, seeds):
            return
        for loss in shown or _values(roots):
            self._session.on_loss(loss, is_scaled=not shown, of_backward=True, node=roots[-1].grad_fn)

    def _is_reached(self, leaves: Leaves, seeds: int) -> bool:
        if self._session.seeds_seen > seeds:
            return True
        return not self._session.sees_seeds and leaves.have_any(self._trained())


class Leaves:
    """The leaves of an autograd graph among its first nodes in depth, which are searched once for all guards.

    Args:
        roots: Tensors that the graph has made.
    """

    def __init__(self, roots: Sequence[torch.Tensor]) -> None:
        self._found: set[int] = set()
        self._others = _leaves(roots)

    def have_any(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Returns whether one of the parameters is a leaf. Searches no further than to the first that is."""
        wanted = {id(parameter) for parameter in parameters}
        if not wanted:
            return False
        if not wanted.isdisjoint(self._found):
            return True
        for leaf in self._others:
            self._found.add(leaf)
            if leaf in wanted:
                return True
        return False


def _leaves(roots: Sequence[torch.Tensor]) -> Iterator[int]:
    """The id of each leaf."""
    stack: list[Any] = [root.grad_fn for root in roots]
    seen: set[Any] = set()
    while stack and len(seen) < MAX_NODES:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield id(variable)
        stack.extend(following for following, _ in node.next_functions)


def _roots(tensors: Any, grad_tensors: Any = None, *rest: Any, **named: Any) -> list[torch.Tensor]:
    """The losses among the arguments of `torch.autograd.backward`."""
    grad_variables = rest[2] if len(rest) > 2 else named.get("grad_variables")
    if grad_tensors is not None or grad_variables is not None:
        return []
    given = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return [tensor for tensor in given if isinstance(tensor, torch.Tensor) and tensor.numel() == 1]


def _values(roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The losses as plain tensors; of one that is sharded, this rank's part."""
    held = [root.to_local() if hasattr(root, "to_local") else root for root in roots]
    return [as_plain(tensor) for tensor in held if is_readable(tensor) and tensor.numel() == 1]


def _is_inside_of_another() -> bool:
    """Whether this call comes from within a backward pass, a pass of ours, or a transform of torch.func."""
    return (
        torch._C._current_graph_task_id() != -1
        or is_rerunning()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _backward(observers: Sequence[LossObserver], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in place of `torch.autograd.backward`."""
    probes = observers[0]._session.probes
    roots = [] if _is_inside_of_another() else probes.run("record of the loss", _roots, *args, **kwargs)
    if not roots:
        return original(*args, **kwargs)
    for observer in observers:
        observer.before()
    result = original(*args, **kwargs)
    leaves = Leaves(roots)
    for observer in observers:
        observer._session.probes.run("record of the loss", observer.after, roots, leaves)
    return result


_patch: SharedPatch[LossObserver] = SharedPatch([(torch.autograd, "backward")], _backward, _disable_dynamo)
