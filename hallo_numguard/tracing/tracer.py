"""The tracer: hooks on every module of a model, and the trace that they fill."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hallo_numguard.core import frames
from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.frames import Frame, Frames, Origin
from hallo_numguard.tracing.nested import floating_tensors_in, is_readable
from hallo_numguard.tracing.origin import Named, Operation, TracedCall, first_in_backward, first_nonfinite, frame_of
from hallo_numguard.tracing.tape import Tape, TensorSnapshot

_MAX_CALLS = 200_000
_MAX_CALLS_AT_FIRST = 32  # calls, if only the first bad one is wanted


class Trace:
    """Result of `trace`, to be read after its block."""

    def __init__(self, tape: Tape, max_calls: int) -> None:
        self._tape = tape
        self._calls: deque[TracedCall] = deque(maxlen=max_calls)
        self._completed = 0
        self._origin: Origin | None = None
        self._is_over = False

    @property
    def frames(self) -> list[Frame]:
        """All calls of modules, in the order of completion."""
        return [frame_of(call, self._tape) for call in self._calls]

    @property
    def first_nonfinite(self) -> Origin | None:
        """The first call that turned finite into non-finite; None if there was none."""
        if not self._is_over:
            return first_nonfinite(self._calls, self._tape)
        return self._origin

    def first_in_backward(self) -> Origin | None:
        """The first such call in the backward pass, whatever the forward pass was like."""
        return first_in_backward(self._calls, self._tape)

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON lines, compressed if the name ends in .gz; `load_trace` reads it without torch."""
        frames.save(Frames(self.frames, self.first_nonfinite, self._completed - len(self._calls)), path)

    def add(self, call: TracedCall) -> None:
        """Adds a completed call."""
        call.position = self._completed
        self._completed += 1
        self._calls.append(call)

    def close(self) -> None:
        """Ends the trace, and finds the origin once."""
        self._tape.flush()
        self._origin = first_nonfinite(self._calls, self._tape)
        self._is_over = True


class TraceOptions(NamedTuple):
    """The arguments of `trace`."""

    gradients: bool
    inputs: bool
    weights: bool
    stop_at_first: bool
    operations: bool


@contextlib.contextmanager
def trace(
    model: nn.Module,
    gradients: bool = True,
    inputs: bool = True,
    weights: bool = True,
    stop_at_first: bool = False,
    operations: bool = False,
) -> Iterator[Trace]:
    """Records what every module of a model makes of its inputs, forward and backward.

    Args:
        model: Any module that is not compiled: hooks cannot see inside of a compiled one.
        gradients: Also read gradients with respect to inputs, outputs and parameters, where a backward pass runs
            inside of the block.
        inputs: Also read the arguments of modules. Without them the first bad call is unknown.
        weights: Also read parameters and buffers.
        stop_at_first: Keep the last 32 calls only, and stop soon after the first that is not finite.
        operations: Also read every operation of torch inside of modules, to name the one that made the first
            non-finite value, and the line that called it. Slow.

    Yields:
        The trace: `first_nonfinite`, `frames`, `save(path)`.

    Raises:
        InvalidInput: If `model` is no module, or one that hooks cannot see into.

    Cost: one kernel launch and some 20 us per call of a module; every tensor is read once, however many modules use it;
    one synchronisation in 64 launches; 64 bytes per tensor. The model's results do not change.
    """
    _check(model)
    with traced(model, TraceOptions(gradients, inputs, weights, stop_at_first, operations)) as result:
        yield result


@contextlib.contextmanager
def traced(model: nn.Module, options: TraceOptions) -> Iterator[Trace]:
    """Does the same as `trace` for a model that runs eagerly."""
    tape = Tape()
    result = Trace(tape, _MAX_CALLS_AT_FIRST if options.stop_at_first else _MAX_CALLS)
    tracer = _Tracer(model, result, tape, options)
    mode = _Operations(tracer) if options.operations else contextlib.nullcontext()
    try:
        with mode:
            yield result
    finally:
        tracer.stop()
        result.close()


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"trace() takes a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidInput(f"trace() cannot look into {name or 'the model'}: it is TorchScript; trace the original")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InvalidInput(
                f"trace() cannot look into {name or 'the model'}: it is compiled. Trace the module that was given to "
                "torch.compile, or set TORCH_COMPILE_DISABLE=1"
            )


class _Tracer:
    def __init__(self, model: nn.Module, result: Trace, tape: Tape, options: TraceOptions) -> None:
        self._result = result
        self._tape = tape
        self._options = options
        self._open: list[TracedCall] = []
        self._times: Counter[str] = Counter()
        self._gradients_seen = 0
        self._bad = 0
        self._on = True
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(), always_call=True))
        if options.weights:  # all in one launch; each call then finds that its own have been seen
            self.snapshot([tensor for module in model.modules() for _, tensor in _weights(module)])

    @property
    def current(self) -> TracedCall | None:
        """The innermost call that is under way, while the trace is on."""
        return self._open[-1] if self._open and self._on else None

    def stop(self) -> None:
        """Removes every hook."""
        self._on = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open.clear()

    def snapshot(self, tensors: Sequence[torch.Tensor]) -> list[TensorSnapshot]:
        """Scans tensors; ends the trace if only the first bad call is wanted."""
        with _disable_current_modes():  # our own operations are not traced
            held = self._tape.snapshot(tensors)
        if self._options.stop_at_first and self._tape.bad > self._bad:  # a mask may hold -Inf, and is no origin
            self._bad = self._tape.bad
            self._on = self._result.first_nonfinite is None
        return held

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._on:
                return
            call = TracedCall(name, type(module).__name__, self._times[name], self._open[-1] if self._open else None)
            self._times[name] += 1
            inputs = _inputs(args, kwargs) if self._options.inputs else []
            weights = _weights(module) if self._options.weights else []
            call.parameters = frozenset(module._parameters)
            held = self._snapshot([*inputs, *weights])
            call.inputs, call.weights = held[: len(inputs)], held[len(inputs) :]
            self._open.append(call)

        return before

    def _after(self) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._open:
                return
            call = self._open.pop()
            if self._on:
                named = list(floating_tensors_in("output", output))
                call.outputs = self._snapshot(named)
                self._result.add(call)
                for _, held in call.outputs:
                    if held.made_by is None:
                        held.made_by = call.position

        return after

    def _snapshot(self, named: Sequence[tuple[str, torch.Tensor]]) -> Sequence[Named]:
        held = self.snapshot([tensor for _, tensor in named])
        if self._options.gradients and torch.is_grad_enabled():
            for (_, tensor), item in zip(named, held, strict=True):
                if tensor.requires_grad and not item.hooked:
                    item.hooked = True
                    self._handles.append(tensor.register_hook(self._gradient_of(item)))
        return [(name, item) for (name, _), item in zip(named, held, strict=True)]

    def _gradient_of(self, held: TensorSnapshot) -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if not self._on or held.gradient is not None or not list(floating_tensors_in("", gradient)):
                return
            (held.gradient,) = self.snapshot([gradient])
            held.gradient.order = self._gradients_seen
            self._gradients_seen += 1

        return arrived


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [*floating_tensors_in("input", args), *floating_tensors_in("input", kwargs)]


def _weights(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters that are here (ZeRO-3 has the others elsewhere), then its buffers."""
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None and p.numel() > 0]
    buffers = [(name, b) for name, b in module._buffers.items() if b is not None]
    return [(name, tensor) for name, tensor in parameters + buffers if is_readable(tensor)]


class _Operations(TorchDispatchMode):
    """Scans the results of every operation inside of a module."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._tracer.current
        if call is None:
            return func(*args, **(kwargs or {}))
        inputs = self._snapshot((args, kwargs))
        result = func(*args, **(kwargs or {}))
        call.operations.append(Operation(f"{func}{_line()}", inputs, self._snapshot(result)))
        return result

    def _snapshot(self, value: Any) -> list[TensorSnapshot]:
        return self._tracer.snapshot([tensor for _, tensor in floating_tensors_in("", value)])


_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


def _line() -> str:
    """The nearest calling line outside of torch."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS, "<")):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"
