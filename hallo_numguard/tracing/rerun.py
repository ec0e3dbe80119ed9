"""A forward and backward pass run again, under a trace, without any effect on training."""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.utils import checkpoint

from hallo_numguard.core.frames import Frame, Origin
from hallo_numguard.core.sources import Source
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.table import StatsTable
from hallo_numguard.tracing.autograd_graph import leaves_of, passed_through
from hallo_numguard.tracing.model_state import state_restored
from hallo_numguard.tracing.nested import Contents, as_plain, contents_of, is_readable, whole_bytes
from hallo_numguard.tracing.tracer import Trace, TraceOptions, traced
from hallo_numguard.tracing.watch import OperationWatch, named_weights, unwatched

_log = logging.getLogger("hallo_numguard")

P = ParamSpec("P")

MAX_GRADIENT_BYTES = 1 << 28  # full gradients that are held at a time
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest value, where kernels round differently
_CLOSE_HALF = 3e-2


class Match(enum.IntEnum):
    """How the outputs of a rerun compare with the original ones, from best to worst."""

    SAME = 0
    """The same bits."""
    CLOSE = 1
    """The same pattern of non-finite values, and nearly the same numbers: other kernels, or another order of sums."""
    ALIKE = 2
    """The same pattern of non-finite values, and other numbers: what a compiled model draws, an eager one does not."""
    DIFFERENT = 3
    FAILED = 4
    """The pass raised an exception."""


class Peers:
    """The other ranks that run the same pass again. This base has none."""

    def agree(self, match: Match) -> Match:
        """Returns the worst match of any rank. All of them call it after every forward and every backward pass."""
        return match

    def have_the_same(self, number: int) -> bool:
        """Returns whether all ranks have this number. All of them call it before a pass with gradients."""
        return True

    def collectives(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a pass, in which no collective waits for a rank that has failed."""
        return contextlib.nullcontext()

    def failed(self) -> None:
        """Says that the pass has raised an exception on this rank."""


@dataclass
class Attempt:
    """Result of a rerun on this rank.

    Attributes:
        match: Comparison of the model's outputs with those before.
        origin: First non-finite place, or None: in the forward pass if only that was run, else in the backward.
        origin_order: Where it is in the pass. Ranks that share a model make the same calls of modules, and send on what
            is not finite, so the earliest counts.
        source: Operation, weight or input that what is not finite came from, if operations were watched.
        sent: The same of what this rank has given to collectives, though what came of it may have been finite here.
        input_absmax: Largest finite absolute value in the inputs of the module of `origin`.
        gradient_absmax: Largest finite float16 absolute value among gradients of activations and parameters.
        parameter_absmax: Largest finite absolute value of each parameter's gradient, by the parameter's id.
        inner: Positions of the outputs that other outputs were made of, so that a part of their gradients comes from
            inside of the model.
        is_partial: Whether such a gradient had a part from outside as well, which is lost, as it was not finite.
        fingerprint: Statistics of all outputs and of the parameters' gradients: equal if a rerun gives the same again.
    """

    match: Match = Match.SAME
    origin: Origin | None = None
    origin_order: int = 0
    source: Source | None = None
    sent: Source | None = None
    input_absmax: float = 0.0
    gradient_absmax: float = 0.0
    parameter_absmax: dict[int, float] = field(default_factory=dict)
    inner: frozenset[int] = frozenset()
    is_partial: bool = False
    fingerprint: list[Any] = field(default_factory=list)


def rerun(
    module: nn.Module,
    call: Callable[[], Any],
    outputs: Sequence[torch.Tensor],
    seeds: dict[int, torch.Tensor],
    factor: float | None,
    arguments: Contents | None = None,
    peers: Peers | None = None,
    watches: bool = False,
    is_compiled: bool = False,
    of_leaves: bool = False,
    of_arguments: bool = False,
) -> Attempt:
    """Runs a pass again.

    Gradients are returned and not accumulated: no reduction, no partition is touched. They are computed in parts, so
    that full gradients of all parameters are never held at once; each part takes a pass.

    Args:
        module: Module to be traced.
        call: Repeats its call, from the same state.
        outputs: Outputs of the original call.
        seeds: Gradients with respect to outputs, by position.
        factor: Factor that the seeds are multiplied by; None for a forward pass only.
        arguments: Contents of the call's arguments.
        peers: The other ranks, which stop together with this one. Default: there are none.
        watches: Whether every operation is watched, to find the source of what is not finite. Slow.
        is_compiled: Whether the original call was compiled, so that its random numbers were others.
        of_leaves: Whether gradients are those of the leaves of autograd's graph, and not of the module's parameters:
            FSDP2 computes with others, gathered ones.
        of_arguments: Whether gradients of the arguments are computed as well, as a stage of a pipeline sends them back.

    Returns:
        Result of the rerun. Buffers, attributes and random state are as before.
    """
    run = _Run(module, call, outputs, seeds, factor, arguments or contents_of("", ()), peers or Peers(), watches)
    run.is_compiled, run.is_of_leaves, run.is_of_arguments = is_compiled, of_leaves, of_arguments
    try:
        for number in itertools.count():
            run.contained(run.go_forward)
            is_over = run.agree() >= Match.DIFFERENT
            parts = 1
            if factor is not None and not is_over:
                parts = run.number_of_parts()
                run.contained(run.go_backward, number)
                is_over = run.agree() >= Match.DIFFERENT
            run.contained(run.finish)
            if is_over or number + 1 == parts:
                break
    finally:  # an interrupt comes from anywhere
        run.close()
    return run.attempt


class _Run:
    """One rerun on this rank.

    Whatever fails in it must not keep other ranks waiting: it is contained, and told to them when they agree.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[], Any],
        outputs: Sequence[torch.Tensor],
        seeds: dict[int, torch.Tensor],
        factor: float | None,
        arguments: Contents,
        peers: Peers,
        watches: bool,
    ) -> None:
        self.attempt = Attempt()
        self.is_compiled = False
        self.is_of_leaves = False
        self.is_of_arguments = False
        self._lengths: list[int] = []  # of the parts of the gradients
        self._watches = watches
        self._module = module
        self._call = call
        self._recorded = outputs
        self._seeds = seeds
        self._factor = factor
        self._arguments = arguments
        self.peers = peers
        self._pass = contextlib.ExitStack()
        self._trace: Trace | None = None
        self._watch: OperationWatch | None = None
        self._outputs: list[torch.Tensor] = []

    def contained(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Does a part of the work, unless an earlier one has failed."""
        if self.attempt.match is Match.FAILED:
            return
        try:
            work(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the model's own code; training goes on
            self.attempt.match = Match.FAILED
            self.peers.failed()
            _log.warning("hallo_numguard could not run the batch again: %s: %s", type(error).__name__, error)
            _log.debug("the whole of it", exc_info=True)

    def agree(self) -> Match:
        """Returns the worst match of any rank."""
        return self.peers.agree(self.attempt.match)

    def go_forward(self) -> None:
        """Calls the model, and compares its outputs."""
        self._pass = contextlib.ExitStack()
        self._pass.enter_context(undisturbed(self._module, self._arguments))
        is_backward = self._factor is not None
        options = TraceOptions(is_backward, inputs=True, weights=True, stop_at_first=False, operations=False)
        self._trace = self._pass.enter_context(traced(self._module, options))
        if self._watches:
            modules = list(self._module.named_modules())
            self._watch = self._pass.enter_context(OperationWatch.on(modules, self._named))
        with self.peers.collectives():
            self._outputs = _outputs_of(self._call())
        with unwatched():
            self.attempt.inner = passed_through(self._outputs)
            match = _compare(self._outputs, self._recorded)
            if match is Match.DIFFERENT and self.is_compiled and _have_one_pattern(self._outputs, self._recorded):
                match = Match.ALIKE
            self.attempt.match = max(self.attempt.match, match)
            self.attempt.fingerprint.append(_statistics(self._outputs).packed.tolist())
            self._find_source(self._outputs)

    def _named(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Kind, name and tensor of what an operation may be given, as it is now."""
        yield from (("input", name, tensor) for name, tensor in self._arguments.tensors)
        yield from named_weights(self._module)
        yield from (("gradient", f"output[{position}]", tensor) for position, tensor in self._seeds.items())

    def _find_source(self, tensors: Sequence[torch.Tensor | None]) -> None:
        if self._watch is not None and self.attempt.source is None:
            self.attempt.source = self._watch.source_of(tensors)

    def number_of_parts(self) -> int:
        """Returns the number of backward passes that give all gradients, the same on every rank.

        It is one where ranks would take others: a backward pass to other parameters has other collectives.
        """
        if not self._lengths:
            lengths = [len(part) for part in _parts(self._targets())]
            is_shared = self.peers.have_the_same(zlib.crc32(repr(lengths).encode()))
            self._lengths = lengths if is_shared else [sum(lengths)]
        return len(self._lengths)

    def _targets(self) -> Sequence[torch.Tensor]:
        """What gradients are asked for, as they become ready."""
        if self.is_of_leaves:
            return leaves_of(self._outputs)
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad][::-1]
        arguments = [tensor for _, tensor in self._arguments.tensors if tensor.requires_grad and tensor.is_leaf]
        return [*parameters, *arguments] if self.is_of_arguments else parameters

    def go_backward(self, number: int) -> None:
        """Computes the gradients of a part of the parameters."""
        begin = sum(self._lengths[:number])
        part = self._targets()[begin : begin + self._lengths[number]]
        with self.peers.collectives():
            gradients = _backward(self._outputs, self._seeds, self._factor or 1.0, part, self.attempt)
        both = zip(part, gradients, strict=True)
        arguments = {id(tensor) for _, tensor in self._arguments.tensors}
        held = [(id(item), x) for item, x in both if x is not None and is_readable(x) and id(item) not in arguments]
        with unwatched():
            table = _statistics([gradient for _, gradient in held])
            self.attempt.parameter_absmax.update(zip((key for key, _ in held), table.absmax.tolist(), strict=True))
            self.attempt.fingerprint.append(table.packed.tolist())
            self._find_source(gradients)

    def close(self) -> None:
        """Ends the pass that is under way: everything is as before."""
        self._outputs = []
        self._pass.close()

    def finish(self) -> None:
        """Ends the pass, and reads its trace."""
        self.close()
        if self._watch is not None:
            self.attempt.sent = self._watch.source_of_sent()
        if self._trace is not None:
            _add_trace(self.attempt, self._trace, self._factor is not None)


def _statistics(tensors: Sequence[torch.Tensor]) -> StatsTable:
    return multi_tensor_stats([as_plain(tensor) for tensor in tensors])


def _outputs_of(output: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in contents_of("output", output).tensors if is_readable(tensor)]


def _add_trace(attempt: Attempt, tr: Trace, is_backward: bool) -> None:
    frames = tr.frames
    origin = tr.first_in_backward() if is_backward else tr.first_nonfinite
    if origin is not None and attempt.origin is None:
        inputs: Sequence[Any] = next((frame.inputs for frame in frames if frame.position == origin.position), ())
        attempt.origin = origin
        attempt.origin_order = _order_of(origin, frames)
        attempt.input_absmax = max((item.record.absmax for item in inputs), default=0.0)
    gradients = [
        tensor.record.absmax
        for frame in frames
        for part, tensor in frame.tensors()
        if part.startswith("grad_") and tensor.dtype == "float16"
    ]
    attempt.gradient_absmax = max([attempt.gradient_absmax, *gradients])


def _order_of(origin: Origin, frames: Sequence[Frame]) -> int:
    """The forward pass comes first: by the first call that was given, or returned, what is not finite."""
    if origin.phase != "forward":
        return 2 * len(frames) - origin.position
    for frame in frames:
        if any(tensor.record.nan or tensor.record.pos_inf for tensor in (*frame.inputs, *frame.outputs)):
            return frame.position
    return origin.position


def _parts(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters from the model's end to its beginning, as gradients become ready, in parts of limited size."""
    parts: list[list[torch.Tensor]] = [[]]
    room = MAX_GRADIENT_BYTES
    for parameter in parameters:
        size = whole_bytes(parameter)
        if parts[-1] and size > room:
            parts.append([])
            room = MAX_GRADIENT_BYTES
        parts[-1].append(parameter)
        room -= size
    return parts


def _backward(
    outputs: Sequence[torch.Tensor],
    seeds: dict[int, torch.Tensor],
    factor: float,
    targets: Sequence[torch.Tensor],
    attempt: Attempt,
) -> Sequence[torch.Tensor | None]:
    positions = [position for position in sorted(seeds) if outputs[position].requires_grad]
    if not positions or not targets:
        return [None] * len(targets)
    outer = [position for position in positions if position not in attempt.inner] or positions
    handles = [
        outputs[position].register_hook(_as_it_was(seeds[position] * factor, attempt))
        for position in positions
        if position not in outer
    ]
    try:
        return torch.autograd.grad(
            [outputs[position] for position in outer],
            targets,
            grad_outputs=[seeds[position] * factor for position in outer],
            allow_unused=True,
        )
    finally:
        for handle in handles:
            handle.remove()


def _as_it_was(recorded: torch.Tensor, attempt: Attempt) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """A hook on what another output was made of: its gradient has another part, if the loss was made of both."""

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        with unwatched():
            both = recorded.isfinite() & gradient.isfinite()
            is_whole = _compare([gradient[both]], [recorded[both]]) <= Match.CLOSE
            if bool(recorded.isfinite().all()):
                return None if is_whole else recorded
            attempt.is_partial |= not is_whole and bool(both.any())
            return None

    return hook


def _compare(made: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor]) -> Match:
    if not recorded or len(made) != len(recorded):
        return Match.DIFFERENT
    return max(_compare_one(as_plain(now), before) for now, before in zip(made, recorded, strict=True))


def _compare_one(now: torch.Tensor, before: torch.Tensor) -> Match:
    if now.shape != before.shape or now.dtype != before.dtype or now.device != before.device:
        return Match.DIFFERENT
    closeness = _CLOSE.get(before.dtype, _CLOSE_HALF)
    now, before = now.double(), before.double()
    if torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True):
        return Match.SAME
    finite = before.isfinite()
    rest_is_same = torch.allclose(now[~finite], before[~finite], rtol=0.0, atol=0.0, equal_nan=True)
    if not rest_is_same or not finite.any():
        return Match.DIFFERENT
    tolerance = closeness * before[finite].abs().max()
    return Match.CLOSE if bool(((now - before)[finite].abs() <= tolerance).all()) else Match.DIFFERENT


def _have_one_pattern(made: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor]) -> bool:
    """Whether the same elements of the outputs are not finite."""
    if not recorded or [tensor.shape for tensor in made] != [tensor.shape for tensor in recorded]:
        return False
    both = zip(made, recorded, strict=True)
    return all(torch.equal(as_plain(now).isfinite(), before.isfinite()) for now, before in both)


def rerun_compiled(
    module: nn.Module, call: Callable[[], Any], outputs: Sequence[torch.Tensor], arguments: Contents, peers: Peers
) -> Match:
    """Repeats a call of a compiled model, compiled, and compares its outputs; see `rerun`."""
    run = _Run(module, call, outputs, {}, None, arguments, peers, watches=False)

    def go_forward() -> None:
        with undisturbed(module, arguments, is_eager=False), peers.collectives():
            run.attempt.match = _compare(_outputs_of(call()), outputs)

    run.contained(go_forward)
    return run.agree()


_reruns = 0  # under way


def is_rerunning() -> bool:
    """Returns whether a pass is being run again; hooks that count passes ignore it."""
    return _reruns > 0


@contextlib.contextmanager
def undisturbed(module: nn.Module, arguments: Contents | None = None, is_eager: bool = True) -> Iterator[None]:
    """Leaves the model, the arguments and all generators as they were: training must not notice the pass.

    Checkpointed blocks keep their activations, because a backward pass that computes them anew (reentrant
    checkpointing) gives no gradients of single tensors; whatever else adds to gradients inside is an error. Compiled
    parts are run eagerly, unless `is_eager` is False, and hooks of the user on parameters are not called: a pass that
    is not one of training must not be counted by them.
    """
    global _reruns
    contents = contents_of("", ()) if arguments is None else arguments
    with (
        state_restored(module, contents),
        _without_recomputation(),
        _without_parameter_hooks(module),
        _without_accumulation(),
        _eager(module) if is_eager else contextlib.nullcontext(),
        torch.enable_grad(),
    ):
        _reruns += 1
        try:
            yield
        finally:
            _reruns -= 1


class _NoRecomputation:
    """Stands in for reentrant checkpointing: calls the function, whose activations are kept."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def _without_recomputation() -> Iterator[None]:
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NoRecomputation  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


@contextlib.contextmanager
def _without_parameter_hooks(module: nn.Module) -> Iterator[None]:
    held = [(hooks, dict(hooks)) for hooks in (parameter._backward_hooks for parameter in module.parameters()) if hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


@contextlib.contextmanager
def _without_accumulation() -> Iterator[None]:
    """Lets no function of the model, inside of a pass of ours, add to the gradients of the parameters."""
    original, thread = torch.autograd.backward, threading.get_ident()

    def backward(*args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1 or threading.get_ident() == thread:
            raise RuntimeError("the model calls backward by itself, which would add to its gradients")
        return original(*args, **kwargs)  # another model's, in another thread

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


@contextlib.contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Runs what is compiled eagerly: hooks cannot see inside of it."""
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None) is not None]
    calls = [part._compiled_call_impl for part in compiled]
    for part in compiled:
        part._compiled_call_impl = None
    is_in_use = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # torch >= 2.6
    try:
        with torch.compiler.set_stance("force_eager") if is_in_use else contextlib.nullcontext():
            yield
    finally:
        for part, call in zip(compiled, calls, strict=True):
            part._compiled_call_impl = call
