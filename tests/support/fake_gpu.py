"""GPUs that are none: tensors in the CPU's memory that say they are on `cuda`, and refuse whatever makes a host wait.

The launcher's own code runs on them unchanged, down to the CUDA kernels, which the shim executes (tests/cuda_shim).
What is faked is torch's side of a GPU: where a tensor is, streams, events, pinned memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hallo_numguard.ops import dispatch, schema
from hallo_numguard.ops.backends import cuda

import shim_build
from kernel_runner import load


class HostSync(AssertionError):
    """Something made the host wait for the device."""


def build_extension(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Compiles csrc/cuda for the shim; returns the extension module and the one that tells what was launched."""
    bindings = shim_build.build_bindings(folder / "bindings.o")
    library = shim_build.build_extension(folder / "shim_extension.so", bindings)
    return load(str(library), "_native_cuda"), load(str(library), "_cuda_shim_log")


_WAITS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.nonzero,
    torch.Tensor.equal,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
    torch.Tensor.is_nonzero,
    torch.Tensor.unique,
    torch.Tensor.masked_select,
    torch.equal,
    torch.nonzero,
    torch.unique,
    torch.masked_select,
    torch.repeat_interleave,
}
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor}
_OPERATORS = {
    schema.tensor_stats_op: schema._tensor_stats,
    schema.multi_tensor_stats_op: schema._multi_tensor_stats,
}


class FakeGpuTensor(torch.Tensor):
    """A tensor on a GPU that is none. `reveal` gives what is in it."""

    gpu: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        gpu = next(value.gpu for value in _tensors((args, kwargs)) if isinstance(value, FakeGpuTensor))
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", gpu)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func in _WAITS:
            raise HostSync(f"{getattr(func, '__name__', func)} of a tensor on the GPU")
        if func is torch.Tensor.copy_:
            return _copy(*args, **kwargs)
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__):
            _check_index(args[1])
        kwargs.pop("device", None)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*[_plain(value) for value in args], **{name: _plain(value) for name, value in kwargs.items()})
        return on_gpu(result, gpu) if isinstance(result, torch.Tensor) else result


def on_gpu(values: torch.Tensor, gpu: int = 0) -> FakeGpuTensor:
    """The same memory, said to be on a GPU."""
    tensor = reveal(values).as_subclass(FakeGpuTensor)
    tensor.gpu = gpu
    return tensor


def reveal(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as what it is, a tensor of the CPU."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _plain(value: Any) -> Any:
    if isinstance(value, FakeGpuTensor):
        return reveal(value)
    return type(value)(_plain(one) for one in value) if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _check_index(index: Any) -> None:
    """A list, or a tensor on the CPU, would first be copied to the device."""
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list) or (isinstance(part, torch.Tensor) and not isinstance(part, FakeGpuTensor)):
            raise HostSync(f"an index on the host, {part}, into a tensor on the GPU")


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _check_copy(source, target, non_blocking)
    reveal(target).copy_(reveal(source))
    return target


def _to(tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
    device = kwargs.pop("device", None)
    rest = []
    for value in args:
        if isinstance(value, (torch.device, str)):
            device = torch.device(value)
        else:
            rest.append(value)
    with torch._C.DisableTorchFunctionSubclass():
        values = reveal(tensor).to(*rest, **kwargs) if rest or kwargs else reveal(tensor)
    if device is None:
        return on_gpu(values, tensor.gpu) if isinstance(tensor, FakeGpuTensor) else values
    target = on_gpu(values.clone(), device.index or 0) if device.type == "cuda" else values.clone()
    _check_copy(tensor, target, non_blocking)
    return target


def _check_copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    sides = [isinstance(one, FakeGpuTensor) for one in (source, target)]
    if all(sides) or not any(sides):
        return
    host = target if sides[0] else source
    if not (non_blocking and host.untyped_storage().data_ptr() in _runtime.pinned):
        raise HostSync("a copy between host and device that is blocking, or of memory that is not pinned")


@dataclass
class _Runtime:
    """What a process knows of its fake GPUs."""

    pinned: dict[int, torch.Tensor] = field(default_factory=dict)  # by address; kept, so that none is used twice
    events: list[FakeEvent] = field(default_factory=list)
    capturing: bool = False
    copies_finish: bool = True  # whether an event is done when somebody asks


_runtime = _Runtime()
_thread = threading.local()


class FakeEvent:
    """An event that is done, or not, as the test says; to wait for it is a `HostSync`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.records = 0
        _runtime.events.append(self)

    def record(self, stream: Any = None) -> None:
        self.records += 1

    def query(self) -> bool:
        if _runtime.capturing:
            raise RuntimeError("an event must not be asked while a graph is captured")
        return _runtime.copies_finish

    def synchronize(self) -> None:
        raise HostSync("wait for an event")


@dataclass(frozen=True)
class FakeStream:
    """A stream: its handle says which thread and GPU it is of."""

    cuda_stream: int


def current_stream(device: torch.device | int | None = None) -> FakeStream:
    index = device.index if isinstance(device, torch.device) else device
    return FakeStream(1000 * getattr(_thread, "number", 0) + 10 + (index or 0))


def be_thread(number: int) -> None:
    """Gives this thread streams of its own."""
    _thread.number = number


class Mode(TorchFunctionMode):
    """Makes torch's factories know of the fake GPUs, and of pinned memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OPERATORS:  # what they are made of, with this mode on again
            with self:
                return _OPERATORS[func](*args, **kwargs)
        if func in _FACTORIES:
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type == "cuda":
                if func is torch.tensor:
                    raise HostSync("torch.tensor on the GPU copies from memory that is not pinned")
                kwargs["device"] = "cpu"
                return on_gpu(func(*args, **kwargs), device.index or 0)
            if kwargs.pop("pin_memory", False):
                return _pin(func(*args, **kwargs))
        if func is torch.Tensor.pin_memory:
            return _pin(args[0].clone())
        if func is torch.Tensor.to and not isinstance(args[0], FakeGpuTensor):
            return _to(*args, **kwargs)
        if func is torch.cat and any(isinstance(one, FakeGpuTensor) for one in args[0]):
            (gpu,) = {one.gpu for one in args[0]}
            return on_gpu(torch.cat([reveal(one) for one in args[0]], *args[1:], **kwargs), gpu)
        return func(*args, **kwargs)


def _pin(values: torch.Tensor) -> torch.Tensor:
    _runtime.pinned[values.untyped_storage().data_ptr()] = values
    return values


@contextlib.contextmanager
def setting_up() -> Iterator[None]:
    """Where tables may be copied to the GPU as usual: what a first call does once, and no later one."""
    blocking = _check_copy
    globals()["_check_copy"] = lambda *_: None
    try:
        yield
    finally:
        globals()["_check_copy"] = blocking


@dataclass
class FakeGpus:
    """What a test holds in hand."""

    runtime: _Runtime
    log: ModuleType | None

    def take_launches(self) -> list[tuple[int, int, int]]:
        """(device, stream, blocks) of each launch of a CUDA kernel since the last call."""
        return [] if self.log is None else list(self.log.take_launches())


@contextlib.contextmanager
def fake_gpus(extension: ModuleType | None, log: ModuleType | None, backend: str) -> Iterator[FakeGpus]:
    """Two GPUs, of which a launcher sees what it would see of real ones. The CUDA launcher needs both modules."""
    _runtime.__dict__.update(vars(_Runtime()))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as cleanup:
        patch.setenv(dispatch.BACKEND_VARIABLE, backend)
        patch.setattr(cuda, "extension", lambda: extension)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", current_stream)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: _runtime.capturing)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", _no_synchronize)
        dispatch.backend_for.cache_clear()
        cleanup.callback(dispatch.backend_for.cache_clear)
        cleanup.enter_context(Mode())
        gpus = FakeGpus(_runtime, log)
        gpus.take_launches()
        yield gpus


def _no_synchronize(*_: Any) -> None:
    raise HostSync("torch.cuda.synchronize")
