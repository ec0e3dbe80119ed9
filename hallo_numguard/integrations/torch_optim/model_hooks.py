"""Names of an optimizer's parameters, and hooks that observe the calls of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.fx import _symbolic_trace as symbolic_trace

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard import named_tensors
from hallo_numguard.guard.guarded_model import Forward
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.integrations.torch_optim.parameter_gradients import trained
from hallo_numguard.integrations.torch_optim.sharding import counts_here, is_sharded, local, place_of
from hallo_numguard.tracing.rerun import is_rerunning

Named = nn.Module | Iterable[tuple[str, torch.Tensor]]


def inner(model: nn.Module) -> nn.Module:
    """Returns the user's own model, out of DistributedDataParallel and torch.compile, with the user's names."""
    found: Any = model
    while True:
        if isinstance(found, nn.parallel.DistributedDataParallel):
            found = found.module
        elif hasattr(found, "_orig_mod"):
            found = found._orig_mod
        else:
            return found


def is_compiled(model: nn.Module) -> bool:
    """Returns whether torch.compile has wrapped the model, or what DistributedDataParallel calls in it."""
    found: Any = model
    while isinstance(found, nn.parallel.DistributedDataParallel):
        found = found.module
    return hasattr(found, "_orig_mod") or getattr(found, "_compiled_call_impl", None) is not None


def distributed(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Returns the DistributedDataParallel that `model` is, or that torch.compile has wrapped; None if there is none."""
    found: Any = model
    while hasattr(found, "_orig_mod"):
        found = found._orig_mod
    return found if isinstance(found, nn.parallel.DistributedDataParallel) else None


def reshard(model: nn.Module) -> None:
    """Shards the parameters again, after a forward pass without the backward pass in which FSDP2 would do so."""
    parts: Iterable[Any] = model.modules()
    for part in parts:
        if hasattr(part, "unshard") and hasattr(part, "reshard"):
            part.reshard()


def refuse_flat_shards(model: nn.Module) -> None:
    """Raises InvalidInput for the first FSDP, whose ranks hold pieces of flat tensors without names."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InvalidInput("FullyShardedDataParallel is not supported: shard with torch.distributed.fsdp.fully_shard")


def loss_in(output: Any) -> torch.Tensor | None:
    """Returns the loss if the output is one, or has it as `loss`; else None."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    is_loss = isinstance(found, torch.Tensor) and found.numel() == 1 and found.requires_grad
    return found if is_loss else None


def named_parameters(named: Named, optimizer: torch.optim.Optimizer) -> list[NamedTensor]:
    """Returns the parameters of the model, or of the list, and the optimizer's other parameters.

    Raises:
        InvalidInput: If the optimizer trains none of them.
    """
    if isinstance(named, nn.Module):
        found = named_tensors.named_parameters(inner(named))
    else:
        found = [NamedTensor("parameter", name, tensor) for name, tensor in named]
    known = {item.tensor for item in found}
    names = dict(trained(optimizer))
    if not known.intersection(names):
        raise InvalidInput("the optimizer trains no parameter of that model: give the model whose parameters it has")
    found += [NamedTensor("parameter", name, tensor) for tensor, name in names.items() if tensor not in known]
    return [replace(item, slice=_slice(item.tensor)) if is_sharded(item.tensor) else item for item in found]


def _slice(tensor: torch.Tensor) -> Callable[[], tuple[torch.Tensor, int, int, int]]:
    def slice_here() -> tuple[torch.Tensor, int, int, int]:
        held = local(tensor.detach())
        if not counts_here(tensor):
            held = held.reshape(-1)[:0]
        return held, *place_of(tensor)

    return slice_here


class Observer(Protocol):
    """Observes the calls of a model."""

    @property
    def forward(self) -> Forward | None:
        """Repeats a call, unobserved; None if that is impossible."""

    @property
    def forward_compiled(self) -> Forward | None:
        """Does the same, compiled if the model is; None if that is impossible."""

    def stop(self) -> None:
        """Stops observing."""


class CallObserver:
    """Observes the calls of a model in training; a copy of the model (deepcopy, pickle) is not observed.

    Calls that are traced or transformed are not observed: torch.func, torch.jit, torch.export, torch.fx.

    Args:
        model: The model, as the script calls it, or a wrapper that calls it.
        on_forward_start: Called with the arguments, before the call. Must not raise.
        on_forward_end: Called with the output. Must not raise.
    """

    def __init__(
        self,
        model: nn.Module,
        on_forward_start: Callable[[tuple[Any, ...], Mapping[str, Any]], None],
        on_forward_end: Callable[[Any], None],
    ) -> None:
        while isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # which calls it
        self._model = model
        self._muted = False

        @_disable_dynamo
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is model and self._is_of_training():
                on_forward_start(args, kwargs)

        @_disable_dynamo
        def after(module: nn.Module, _: Any, output: Any) -> None:
            if module is model and self._is_of_training():
                on_forward_end(output)

        # After every hook that changes the model's arguments; before every hook that changes its output.
        self._handles = [
            model.register_forward_pre_hook(_Hook(before), with_kwargs=True),
            model.register_forward_hook(_Hook(after)),
        ]
        _script_patch.add(self)

    def _is_of_training(self) -> bool:
        """Whether the present call is the script's own, and none that is traced or made by a guard."""
        return not self._muted and not is_rerunning() and not _is_traced()

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Calls the model unobserved, and eagerly if it was compiled."""
        model = inner(self._model)
        with self._mute():
            output = model(*args, **kwargs)
        reshard(model)
        return output

    def forward_compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Calls the model unobserved, as it is."""
        with self._mute():
            return self._model(*args, **kwargs)

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        _script_patch.discard(self)

    @contextlib.contextmanager
    def _mute(self) -> Iterator[None]:
        self._muted = True
        try:
            yield
        finally:
            self._muted = False


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
_TRACING_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def _is_traced() -> bool:
    """Whether the present call is traced or transformed: its tensors hold no numbers, or those of several calls."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)
        or getattr(symbolic_trace, "_is_fx_tracing_flag", False)
    )


_SCRIPT_FRAMES = 2  # of ours between the caller of torch.jit.script, whose names it resolves, and torch's own


def _script_without_hooks(original: Callable[..., Any], obj: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.jit.script, which compiles every hook that it finds, without those of guards."""
    kwargs["_frames_up"] = kwargs.get("_frames_up", 0) + _SCRIPT_FRAMES
    modules = list(obj.modules()) if isinstance(obj, nn.Module) else []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                if any(isinstance(hook, _Hook) for hook in hooks.values()):
                    stack.callback(_replace, hooks, dict(hooks))
                    _replace(hooks, {key: hook for key, hook in hooks.items() if not isinstance(hook, _Hook)})
        return original(obj, *args, **kwargs)


class _ScriptPatch:
    """One patch of torch.jit.script, however many models are observed, which goes with the last of them."""

    def __init__(self) -> None:
        self._observers: WeakSet[CallObserver] = WeakSet()
        self._patches = MethodPatches()

    def add(self, observer: CallObserver) -> None:
        """Patches the function, if no other model is observed."""
        if not self._observers:
            self._patches.restore()  # after observers that nobody has stopped
            self._patches = MethodPatches()
            self._patches.wrap(torch.jit, "script", _script_without_hooks)
        self._observers.add(observer)

    def discard(self, observer: CallObserver) -> None:
        """Puts the function back, if no other model is observed."""
        self._observers.discard(observer)
        if not self._observers:
            self._patches.restore()


_script_patch = _ScriptPatch()


def _replace(hooks: dict[int, Any], contents: Mapping[int, Any]) -> None:
    """Gives a module's hooks other contents, in their order."""
    hooks.clear()
    hooks.update(contents)


class _Hook:
    """A hook that stays behind when its module is copied or pickled.

    A pickle refers to nothing of ours, so that it loads where this package is not installed: there the hook is the exit
    of a null context, which takes any three arguments and returns None.
    """

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        if self._function is not None and not _is_exporting():
            self._function(*args)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
