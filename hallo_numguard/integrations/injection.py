"""Deliberate faults, to prove that an alarm works."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.guard.parameter_stats import NONE
from hallo_numguard.integrations.deepspeed.version import is_instance_of
from hallo_numguard.ops.layout import unravel
from hallo_numguard.tracing.nested import contents_of
from hallo_numguard.tracing.rerun import is_rerunning

KINDS = ("parameter", "buffer", "optimizer_state", "input", "activation", "gradient")


class Injection:
    """A fault that is planted, now or later. `remove()` takes back a fault that is still to come; damage done stays.

    Attributes:
        planted: Whether the fault has been planted on this rank: a value was changed.
    """

    def __init__(self) -> None:
        self.planted = False
        self._is_evaluating = False
        self._handles: list[Any] = []  # of the forward pass
        self._backward_handles: list[Any] = []

    def remove(self) -> None:
        """Removes every hook."""
        _remove(self._handles)
        _remove(self._backward_handles)


def inject(
    target: Any,
    kind: str,
    where: str | None = None,
    index: Sequence[int] | None = None,
    value: float = float("nan"),
    step: int = 1,
    rank: int | None = None,
) -> Injection:
    """Plants a fault in a training run.

    Args:
        target: A model, or an object with one as `.module` or `.model`: DeepSpeedEngine, Trainer, GuardedOptimizer.
        kind: Kind of fault. "parameter", "buffer" and "optimizer_state" (moments) stay damaged, as by a corrupted
            file; "input" (the first floating-point tensor of the batch) and "activation" (output of the module
            `where`) are bad in one step only, and "gradient" (of the parameter `where`, before the reduction) in one
            backward pass of that step, as by a fault of the hardware: not in a replay.
        where: Fully qualified name of the parameter, buffer or module; not for "input". In a pipeline of DeepSpeed,
            where there is no "input", ranks of other stages plant nothing, and each micro-batch is a forward pass.
        index: Index of the element in the whole tensor's shape. Default: the first.
        value: Value of that element.
        step: Number of the forward pass, counted from now; 1 is the next. Passes under `torch.no_grad()`, as in an
            evaluation, do not count, and have no fault.
        rank: Global rank with the fault. Default: all.

    Returns:
        The injection, with `planted` and `remove()`.

    Raises:
        InvalidInput: If the kind or the name is unknown.
    """
    if kind not in KINDS:
        raise InvalidInput(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    model = _model_of(target)
    injection = Injection()
    if rank is not None and rank != _this_rank():
        return injection
    is_stage = is_instance_of(target, "PipelineEngine")
    if is_stage and kind == "input":
        raise InvalidInput("inject(kind='input') knows no batch of a pipeline: damage a sample of the data instead")
    if is_stage and where not in _named(model, kind):
        return injection  # another stage has it
    plant = _planter(target, model, kind, where, index, value)
    passes = 0

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal passes
        if is_rerunning():
            return None
        injection._is_evaluating = not torch.is_grad_enabled()
        if injection._is_evaluating:
            return None
        passes += 1
        if passes == step:
            return plant(injection, args, kwargs)
        if passes > step:
            _remove(injection._handles)
        return None

    # An engine is called before its model is; by then ZeRO stage 3 has begun to gather what would be damaged.
    called = target if isinstance(target, nn.Module) and not is_stage else model
    injection._handles.append(called.register_forward_pre_hook(before_forward, prepend=True, with_kwargs=True))
    return injection


Planter = Callable[[Injection, tuple[Any, ...], dict[str, Any]], Any]


def _planter(
    target: Any, model: nn.Module, kind: str, where: str | None, index: Sequence[int] | None, value: float
) -> Planter:
    if kind == "input":

        def plant_input(injection: Injection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = _with_bad_input(args, kwargs, index, value)
            injection.planted = True
            return changed

        return plant_input
    if kind == "activation":
        module = _find(_named(model, kind), "module", where)

        def plant_activation(injection: Injection, *_: Any) -> None:
            def change(*call: Any) -> Any:
                if injection._is_evaluating:
                    return None
                output, changed = _first_changed(call[-1], index, value)
                injection.planted |= changed
                return output

            injection._handles.append(module.register_forward_hook(change, prepend=True))  # every other hook sees it

        return plant_activation
    if kind == "buffer":
        buffer = _find(_named(model, kind), "buffer", where)
        return _writer(lambda: _write(buffer, index, value))
    parameter = _find(_named(model, kind), "parameter", where)
    if kind == "gradient":
        return lambda injection, *_: _plant_gradient(injection, model, parameter, index, value)
    if kind == "optimizer_state":
        return _writer(lambda: _write_state(target, parameter, index, value))
    return _writer(lambda: _write_parameter(parameter, index, value))


def _writer(write: Callable[[], bool]) -> Planter:
    def plant(injection: Injection, *_: Any) -> None:
        injection.planted = write()

    return plant


def _plant_gradient(
    injection: Injection, model: nn.Module, parameter: Any, index: Sequence[int] | None, value: float
) -> None:
    """Changes the gradient once, in the first backward pass that comes through this call of the model."""
    is_under_way = False

    def begin(_: torch.Tensor) -> None:
        nonlocal is_under_way
        if not is_rerunning():
            is_under_way = True
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def end() -> None:
        nonlocal is_under_way
        is_under_way = False

    def note_output(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal is_under_way
        forward_handle.remove()
        tensors = [tensor for _, tensor in contents_of("output", output).tensors if tensor.requires_grad]
        injection._backward_handles += [tensor.register_hook(begin) for tensor in tensors]
        is_under_way = not tensors  # then whatever backward pass is the next

    def change(gradient: torch.Tensor) -> torch.Tensor | None:
        if not is_under_way or is_rerunning():
            return None
        _remove(injection._backward_handles)
        injection.planted = True
        return _changed(gradient, index, value)

    hooks = dict(parameter._backward_hooks or {})
    forward_handle = model.register_forward_hook(note_output)
    injection._backward_handles += [parameter.register_hook(change), forward_handle]
    for key, hook in hooks.items():  # behind ours, so that every one of them sees it
        del parameter._backward_hooks[key]
        parameter._backward_hooks[key] = hook


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _write_parameter(parameter: Any, index: Sequence[int] | None, value: float) -> bool:
    from hallo_numguard.integrations.torch_optim.sharding import is_sharded

    if is_sharded(parameter):
        return _write_part(parameter, index, value)
    if not hasattr(parameter, "ds_tensor"):
        return _write(parameter, index, value)
    is_whole = parameter.numel() > 0  # at the moment
    if is_whole:
        _write(parameter, index, value)
    from hallo_numguard.integrations.deepspeed.partition import slice_of
    from hallo_numguard.integrations.deepspeed.swapping import in_memory

    mine = slice_of(parameter)  # ZeRO stage 3: every rank has a slice
    place = _flat(tuple(parameter.ds_shape), index) - mine.start
    is_mine = 0 <= place < mine.real
    if is_mine:
        with in_memory(parameter):
            parameter.ds_tensor.data.view(-1)[place] = value
    return _write_secondary(parameter, index, value) or is_whole or is_mine


def _write_secondary(parameter: Any, index: Sequence[int] | None, value: float) -> bool:
    """Writes into the second copy that ZeRO++ keeps among fewer ranks, and uses in place of the first one."""
    from hallo_numguard.integrations.deepspeed.partition import secondary_slice_of

    mine = secondary_slice_of(parameter)
    if mine is None:
        return False
    place = _flat(tuple(parameter.ds_shape), index) - mine.start
    is_mine = 0 <= place < mine.real
    if is_mine:
        parameter.ds_secondary_tensor.data.view(-1)[place] = value
    return is_mine


def _write_part(tensor: Any, index: Sequence[int] | None, value: float) -> bool:
    from hallo_numguard.integrations.torch_optim.sharding import find, local

    place = find(tensor, _flat(tuple(tensor.shape), index))
    if place is None:
        return False
    local(tensor.detach()).view(-1)[place] = value
    return True


def _write_state(target: Any, parameter: Any, index: Sequence[int] | None, value: float) -> bool:
    from hallo_numguard.integrations.deepspeed.adapters import adapter_for
    from hallo_numguard.integrations.torch_optim.sharding import is_sharded

    optimizer = getattr(target, "optimizer", target)
    if is_sharded(parameter):
        moments = [moment for moment in optimizer.state[parameter].values() if is_sharded(moment)]
        return any([_write_part(moment, index, value) for moment in moments])
    place = _flat(tuple(getattr(parameter, "ds_shape", parameter.shape)), index)
    only_this = defaultdict(lambda: -1, {parameter: 0})
    is_written = False
    for tensor, piece in adapter_for(optimizer, only_this).changed_state_parts():
        is_here = piece.start <= place < piece.start + tensor.numel()
        if piece.parameter == 0 and piece.run == NONE and is_here:  # else a scale of several elements
            tensor.data[unravel(place - piece.start, tensor.shape)] = value
            is_written = True
    return is_written


def _with_bad_input(args: tuple[Any, ...], kwargs: dict[str, Any], index: Sequence[int] | None, value: float) -> Any:
    changed, found = _first_changed(args, index, value)
    if found:
        return changed, kwargs
    changed, found = _first_changed(kwargs, index, value)
    if not found:
        raise InvalidInput("inject(kind='input') found no floating-point tensor among the arguments of the model")
    return args, changed


def _first_changed(values: Any, index: Sequence[int] | None, value: float) -> tuple[Any, bool]:
    """A copy of nested values with the first floating-point tensor changed, and whether there was one."""
    if isinstance(values, torch.Tensor):
        return (_changed(values, index, value), True) if values.is_floating_point() else (values, False)
    if isinstance(values, dict):
        items, found = _first_changed(list(values.values()), index, value)
        return type(values)(zip(values, items, strict=True)), found
    if isinstance(values, (list, tuple)):
        items = list(values)
        for position, item in enumerate(items):
            items[position], found = _first_changed(item, index, value)
            if found:
                return type(values)(items), True
    return values, False


def _changed(tensor: torch.Tensor, index: Sequence[int] | None, value: float) -> torch.Tensor:
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    mask[_element(tensor, index)] = True
    return torch.where(mask, torch.full_like(tensor, value), tensor)


def _write(tensor: torch.Tensor, index: Sequence[int] | None, value: float) -> bool:
    tensor.data[_element(tensor, index)] = value
    return True


def _element(tensor: torch.Tensor, index: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(index) if index is not None else (0,) * tensor.dim()


def _flat(shape: tuple[int, ...], index: Sequence[int] | None) -> int:
    place = 0
    for size, at in zip(shape, index if index is not None else (0,) * len(shape), strict=True):
        place = place * size + at
    return place


def _named(model: nn.Module, kind: str) -> dict[str, Any]:
    """What a fault of that kind can be planted in, by name."""
    if kind == "activation":
        return dict(model.named_modules())
    return dict(model.named_buffers() if kind == "buffer" else model.named_parameters())


def _find(named: dict[str, Any], what: str, where: str | None) -> Any:
    if where not in named:
        raise InvalidInput(
            f"expected the name of a {what} of the model, got {where!r}; it has {', '.join(named)[:500]}"
        )
    return named[where]


def _model_of(target: Any) -> nn.Module:
    for candidate in (getattr(target, "module", None), getattr(target, "model", None), target):
        if isinstance(candidate, nn.Module):
            return candidate
    raise InvalidInput(f"expected a model, or what has one as .module or .model, got {type(target).__name__}")


def _this_rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0
