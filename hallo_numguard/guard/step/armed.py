"""Armed steps: those that are watched operation by operation, because an earlier one stayed unexplained."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.sources import Source
from hallo_numguard.guard.containment import contain_failures
from hallo_numguard.guard.step.pending import MAX_CALLS, StepOwner
from hallo_numguard.tracing.rerun import is_rerunning
from hallo_numguard.tracing.watch import NamedNow, OperationWatch, named_weights, unwatched

ARMED_STEPS = 3  # after an unexplained one
MAX_FRUITLESS = 3  # unexplained steps that were watched, after which no step is


class ArmedSteps:
    """Watches a step from the model's first call until the optimizer's step, the user's own code included.

    All ranks arm the same steps. Results are the same bits, and take several times as long. Inside of a compiled model
    nothing is seen.

    Args:
        module: The model.
        is_compiled: Returns whether it is compiled, so that hooks on its modules would compile it again.
        steps: Owner of the pending step.
        is_possible: Whether steps can be watched at all: not where a pipeline's stages send each other what they make.
    """

    def __init__(
        self, module: nn.Module, is_compiled: Callable[[], bool], steps: StepOwner, is_possible: bool = True
    ) -> None:
        self._module = module
        self._is_compiled = is_compiled
        self._steps = steps
        self._left = 0
        self._is_possible = is_possible
        self._fruitless = 0
        self._calls = 0  # of the model, since the watch has begun
        self._on = contextlib.ExitStack()
        self._pause = contextlib.ExitStack()
        self._watch: OperationWatch | None = None  # while it is on
        self._compiled: Callable[..., Any] | None = None  # the module's compiled call, while ours is in its place

    @property
    def is_armed(self) -> bool:
        """Whether the next steps are watched."""
        return self._left > 0

    def arm(self) -> None:
        """Arms the next steps."""
        if self._is_possible and self._fruitless < MAX_FRUITLESS:
            self._left = ARMED_STEPS
            self._begin_outside_of_compiled_call()

    def model_is_called(self) -> None:
        """Begins to watch at the first call of an armed step."""
        if torch.is_grad_enabled():
            self._begin()
        elif not self._steps.pending.calls:  # an evaluation, perhaps a long one
            self._end()
        if self._watch is None:
            return
        self._calls += 1
        if self._calls > MAX_CALLS:  # no step follows
            self._left = 0
            self._end()
            return
        self._watch.calls.enter("", self._module)
        self._pause.close()
        if self._is_compiled() and torch._C._len_torch_dispatch_stack() == 1:
            # Inside of a mode torch would call it eagerly, and other random numbers would be drawn.
            self._pause.enter_context(unwatched())

    def _begin_outside_of_compiled_call(self) -> None:
        """Begins to watch before the call of a module that was compiled in place.

        Hooks run inside of that call, and when it returns, torch puts back whether modes were on when it began.
        """
        compiled = getattr(self._module, "_compiled_call_impl", None)
        if compiled is None or self._compiled is not None:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and not is_rerunning():
                with contain_failures("watch of the operations", "the step is not watched"):
                    self._begin()
            return compiled(*args, **kwargs)

        self._compiled = compiled
        self._module._compiled_call_impl = call

    def _put_back_compiled_call(self) -> None:
        if self._compiled is not None:
            self._module._compiled_call_impl = self._compiled
            self._compiled = None

    def model_has_returned(self) -> None:
        """Tells that what follows is no part of the model's call."""
        self._pause.close()
        if self._watch is not None:
            self._watch.calls.leave("")

    def _begin(self) -> None:
        # Modes end in the opposite order of their beginning, and one of the user's may end before ours.
        if self._watch is not None or not self._left or torch._C._len_torch_dispatch_stack():
            return
        modules = [(name, module) for name, module in self._module.named_modules() if name]
        if self._is_compiled() or any(getattr(module, "_compiled_call_impl", None) for _, module in modules):
            modules = []
        self._watch = self._on.enter_context(OperationWatch.on(modules, _named_weakly(self)))
        self._watch.skips_ours = True

    def _end(self) -> OperationWatch | None:
        watch, self._watch, self._calls = self._watch, None, 0
        self._pause.close()
        self._on.close()
        return watch

    def __del__(self) -> None:
        """Leaves no mode behind when the guard is gone with its model."""
        self._end()

    def _named(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Kind, name and tensor of what an operation may be given, as it is now."""
        for call in self._steps.pending.calls:
            yield from (("input", name, tensor) for name, tensor in call.contents.tensors)
        yield from named_weights(self._module)

    def backward_is_over(self) -> None:
        """Stops watching; what was seen belongs to the pending step."""
        if self._watch is not None:
            self._steps.pending.watch = self._end()

    def source(self, losses: Sequence[torch.Tensor], is_alone: bool) -> Source | None:
        """Returns what the step's losses or gradients have from this rank; None if they are finite, or not watched.

        Args:
            losses: The losses.
            is_alone: Whether no other rank's gradients are added to those of this one.
        """
        watch = self._steps.pending.watch
        if watch is None:
            return None
        found = watch.source_of(losses) or watch.source_of_gradients()
        is_foreign = found is not None and (found.kind == "outside" or found.is_received)
        if is_foreign and not is_alone and watch.source_of(losses) is None:
            found = None  # another rank's may have arrived in a reduction
        self._fruitless = 0 if found is not None else self._fruitless + 1
        return found

    def step_is_over(self) -> None:
        """Counts a step, if it was watched."""
        self.backward_is_over()
        if self._steps.pending.watch is not None:
            self._left -= 1
            if not self._left:
                self._put_back_compiled_call()

    def stop(self) -> None:
        """Ends for good."""
        self._left = 0
        self._end()
        self._put_back_compiled_call()


def _named_weakly(steps: ArmedSteps) -> NamedNow:
    """The names that armed steps know, from a watch that does not keep them alive."""
    method = weakref.WeakMethod(steps._named)

    def named() -> Iterator[tuple[str, str, torch.Tensor]]:
        found = method()
        return iter(()) if found is None else found()

    return named
