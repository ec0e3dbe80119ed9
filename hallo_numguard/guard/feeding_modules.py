"""Frozen modules outside of the guarded model that feed it: an image encoder, a text encoder, a reward model.

Their calls are recorded by reference. Only after a bad loss are they read, and the first bad one is run again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.frames import Origin
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import clip
from hallo_numguard.guard.containment import contain_failures
from hallo_numguard.guard.named_tensors import NamedTensor, named_buffers, named_parameters, scan_tensors
from hallo_numguard.guard.readable import readable_tensors
from hallo_numguard.tracing.model_state import version_of
from hallo_numguard.tracing.nested import Contents, contents_of
from hallo_numguard.tracing.rerun import is_rerunning, undisturbed
from hallo_numguard.tracing.rng_and_autocast import Autocast, RandomState
from hallo_numguard.tracing.tracer import TraceOptions, traced

Also = Sequence[nn.Module] | Mapping[str, nn.Module]
"""Modules that feed the guarded one, by name, or without."""

MAX_CALLS = 64  # of a step
MAX_KEPT_BYTES = 256 << 20  # of a step
_MAX_NAME_BYTES = 300
_MAX_LINE_BYTES = 500
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@dataclass(eq=False)
class FeedingCall:
    """One call of a feeding module, or of a part of it that the script calls by itself.

    Attributes:
        name: Name of the module, with the feeding module's.
        module: Module that was called.
        args, kwargs: Its arguments. References, no copies.
        inputs, outputs: Tensors in its arguments and in what it returned.
        random: State of torch's generators before the call.
        autocast: Settings of torch.autocast in the call.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Contents
    outputs: Contents = field(default_factory=lambda: contents_of("", ()))
    random: RandomState = field(default_factory=RandomState.now)
    autocast: Autocast = field(default_factory=Autocast.now)
    _versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._versions = [version_of(tensor) for _, tensor in self.inputs.tensors]

    @property
    def changed(self) -> bool:
        """Whether one of its arguments was written to since."""
        return self._versions != [version_of(tensor) for _, tensor in self.inputs.tensors]

    @property
    def nbytes(self) -> int:
        """Size of what is kept for this call, in bytes."""
        return sum(tensor.nbytes for _, tensor in (*readable(self.inputs), *readable(self.outputs)))


@dataclass(frozen=True)
class BadFeed:
    """The first feeding module that made a non-finite value.

    Attributes:
        module: Name of the module, or part of one, that the script has called.
        origin: First place in it that is not finite.
        details: Sentences about it.
    """

    module: str
    origin: Offender
    details: tuple[str, ...] = ()


def named_modules(also: Also) -> dict[str, nn.Module]:
    """Returns feeding modules by name: the caller's, or the names of their classes, numbered where they repeat.

    Raises:
        InvalidInput: If one is no module, or has no name.
    """
    if isinstance(also, Mapping):
        named = dict(also)
    elif isinstance(also, (list, tuple)):
        named = {}
        for module in also:
            cls = type(getattr(module, "_orig_mod", module)).__name__
            name, number = cls, 1
            while name in named:
                number += 1
                name = f"{cls}_{number}"
            named[name] = module
    else:
        raise InvalidInput(f"also must be modules, or modules by name, got {type(also).__name__}")
    for name, module in named.items():
        if not isinstance(module, nn.Module) or not isinstance(name, str) or not name:
            raise InvalidInput(f"also must be modules, or modules by name, got {name!r}: {type(module).__name__}")
    return named


class FeedingModules:
    """Observes the calls of feeding modules, and finds the one that made a non-finite value.

    Args:
        modules: Feeding modules by name.
        calls: Returns the list that takes the calls of the step under way.

    Attributes:
        tensors: Their parameters and buffers, named with the modules' names.
    """

    def __init__(self, modules: Mapping[str, nn.Module], calls: Callable[[], deque[FeedingCall]]) -> None:
        self._modules = modules
        self._calls = calls
        self._depth = 0  # calls under way, one inside of another
        self._open: FeedingCall | None = None
        self._handles: list[Any] = []
        self.tensors = [item for name, module in modules.items() for item in _named(name, module)]

    def start(self) -> None:
        """Puts hooks on the modules, and on their own parts: a script may call these by themselves (`vae.encode`)."""
        for name, module in self._modules.items():
            with contain_failures("record of feeding modules", f"the calls of {name} are not seen"):
                for part_name, part in _parts(name, module):
                    before = part.register_forward_pre_hook(_Hook(self._before(part_name)), with_kwargs=True)
                    self._handles.append(before)
                    self._handles.append(part.register_forward_hook(_Hook(self._after), always_call=True))

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_rerunning():
                return
            self._depth += 1
            if self._depth == 1:
                with contain_failures("record of feeding modules", f"this call of {name} is not kept"):
                    self._open = FeedingCall(name, module, args, kwargs, contents_of("input", (args, kwargs)))

        return before

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if is_rerunning():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        call, self._open = self._open, None
        if call is None:
            return
        with contain_failures("record of feeding modules", f"this call of {call.name} is not kept"):
            call.outputs = contents_of("output", output)
            calls = self._calls()
            calls.append(call)
            room = MAX_KEPT_BYTES - sum(item.nbytes for item in calls)
            while room < 0 and calls:
                room += calls.popleft().nbytes

    def first_bad(self, rank: int) -> BadFeed | None:
        """Returns the first call of the step whose output is not finite; None if there is none. Synchronises.

        -Inf alone does not count, as in masks.
        """
        with contain_failures("examination of feeding modules", "the report does not name them"):
            for call in self._calls():
                output = _first_bad("activation", call.outputs, rank)
                if output is None:
                    continue
                given = _first_bad("input", call.inputs, rank)
                if given is not None:
                    named = replace(given, name=_clipped(f"{call.name}: {given.name}"), module=_clipped(call.name))
                    return BadFeed(call.name, named, (f"{call.name} was called with what is not finite",))
                return self._explained(call, output, rank)
        return None

    def _explained(self, call: FeedingCall, output: Offender, rank: int) -> BadFeed:
        """Runs the call again to find the module inside, where that disturbs nothing."""
        named = replace(output, name=_clipped(call.name), module=_clipped(call.name))
        if call.changed or _is_distributed(call.module):
            return BadFeed(call.name, named)
        origin = None
        with contain_failures("examination of feeding modules", "the module inside is not named"):
            origin = _run_again(call)
        if origin is None:
            return BadFeed(call.name, named)
        return BadFeed(
            call.name,
            _offender(call.name, origin, rank),
            (clip(f"run again, the first part of {call.name} that was not finite is {origin}", _MAX_LINE_BYTES),),
        )


def _run_again(call: FeedingCall) -> Origin | None:
    module = getattr(call.module, "_orig_mod", call.module)
    options = TraceOptions(gradients=False, inputs=True, weights=True, stop_at_first=True, operations=True)
    with undisturbed(module, call.inputs), torch.no_grad(), call.autocast.restored(), _NoCollectives():
        call.random.restore()
        with traced(module, options) as result:
            module(*call.args, **call.kwargs)
        return result.first_nonfinite


def _offender(name: str, origin: Origin, rank: int) -> Offender:
    whole = ".".join(filter(None, (name, origin.name)))
    module = whole.rpartition(".")[0] if origin.kind in ("parameter", "buffer") else whole
    operation, _, line = origin.operation.partition(" at ")
    offender = origin.tensor.offender(origin.kind, _clipped(whole), _clipped(module), rank)
    return replace(offender, index=origin.index, operation=_clipped(operation) or None, line=_clipped(line) or None)


def readable(contents: Contents) -> list[tuple[str, torch.Tensor]]:
    """Returns the tensors that hold floating-point numbers, and can be read."""
    return list(readable_tensors(contents.tensors))


def _first_bad(kind: str, contents: Contents, rank: int) -> Offender | None:
    tensors = [NamedTensor(kind, name, tensor) for name, tensor in readable(contents)]
    stats = scan_tensors(tensors)
    bad = (position for position in stats.bad_positions() if not stats.only_negative_infinity(position))
    return next((tensors[position].offender(stats, position, rank) for position in bad), None)


def _clipped(text: str) -> str:
    return clip(text, _MAX_NAME_BYTES)


def _named(name: str, module: nn.Module) -> Iterator[NamedTensor]:
    plain: nn.Module = getattr(module, "_orig_mod", module)
    for item in (*named_parameters(plain), *named_buffers(plain)):
        yield replace(item, name=f"{name}.{item.name}", aliases=tuple(f"{name}.{alias}" for alias in item.aliases))


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and the parts of it that a script may call by themselves. A compiled one is seen from outside only."""
    yield name, module
    if not hasattr(module, "_orig_mod"):
        yield from _children(name, module)


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # which are not called
            yield from _children(f"{name}.{child_name}", child)
        else:
            yield f"{name}.{child_name}", child


def _is_distributed(module: nn.Module) -> bool:
    """Whether a call makes collectives, into which other ranks would have to come."""
    shards = any(hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id") for tensor in module.parameters())
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel")
    return shards or any(type(part).__name__ in wrappers for part in module.modules())


class _NoCollectives(TorchDispatchMode):
    """Refuses collectives: other ranks do not run the call again."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _COLLECTIVES:
            raise RuntimeError("the module makes collectives, so that it cannot be run again on this rank alone")
        return func(*args, **(kwargs or {}))


class _Hook:
    """A hook that stays behind when its module is copied or pickled: there it is the exit of a null context."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    @_disable_dynamo
    def __call__(self, *args: Any) -> None:
        if self._function is not None:
            self._function(*args)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
