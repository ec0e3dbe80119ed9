"""The parts of an engine that the guard reads: its model, how to call it, its configuration."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from hallo_numguard.guard.named_tensors import NamedTensor, named_parameters
from hallo_numguard.integrations.deepspeed import tiled
from hallo_numguard.integrations.deepspeed.partition import slice_of
from hallo_numguard.tracing.watch import is_on_nvme


def call_module(engine: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls the model as the engine's forward does, but not through it, which would change later weights (ZeRO 3)."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:  # a pass under a trace may read parameters in another order, which would be an error
        _forget_order(offload)
    if engine.fp16_auto_cast():
        args = engine._cast_inputs_half(args)
    with _autocast(engine), _checkpointing_off(), _leaf_reductions_off(engine.module), tiled.with_graph():
        return engine.module(*args, **kwargs)


def recover(engine: Any, has_failed: bool) -> None:
    """Makes ZeRO stage 3 forget a pass of the guard: the order of its modules, and what it has left gathered.

    Args:
        engine: The engine.
        has_failed: Whether the pass has failed midway, on any rank.
    """
    offload: Any = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    release = getattr(offload, "release_backward_leftovers", None)  # as at the end of a backward pass of the engine
    if has_failed or release is None:
        _release_all(engine, offload)
    else:
        release()
    _forget_order(offload)


def _forget_order(offload: Any) -> None:
    """Drops the recorded order of modules. The next forward pass records it anew, as the first one did."""
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _release_all(engine: Any, offload: Any) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    under_way = getattr(engine.module, "ds_inflight_param_registry", ())
    parameters: Any = engine.module.parameters()
    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.INFLIGHT and parameter not in under_way:
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # its collective was never entered
    offload.partition_all_parameters()


class _ActivationsKept:
    """Stands in for DeepSpeed's own checkpointing, whose backward pass gives no gradients of single tensors."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> None:
        outputs = function(*args)
        all_outputs += [outputs] if isinstance(outputs, torch.Tensor) else outputs


@contextlib.contextmanager
def _checkpointing_off() -> Iterator[None]:
    module: Any = sys.modules.get("deepspeed.runtime.activation_checkpointing.checkpointing")
    original = getattr(module, "CheckpointFunction", None)
    if original is None:
        yield
        return
    module.CheckpointFunction = _ActivationsKept
    try:
        yield
    finally:
        module.CheckpointFunction = original


# Of the backward pass, or those of the forward pass by which releases before 0.18 put hooks on a leaf module's inputs.
_HOOKS = ("_backward_hooks", "_forward_pre_hooks", "_forward_hooks")


@contextlib.contextmanager
def _leaf_reductions_off(module: torch.nn.Module) -> Iterator[None]:
    """Calls leaf modules of ZeRO stage 3 without the hooks by which their backward pass reduces gradients.

    Whatever makes a gradient of their outputs would call them, and they reduce the gradients of their parameters.
    """
    leaves: set[Any] = {getattr(parameter, "ds_z3_leaf_module", None) for parameter in module.parameters()} - {None}
    hooks_of = {(leaf, kind): getattr(leaf, kind) for leaf in leaves for kind in _HOOKS}
    for (leaf, kind), hooks in hooks_of.items():
        kept = ((key, hook) for key, hook in hooks.items() if hook.__module__ != "deepspeed.runtime.zero.stage3")
        setattr(leaf, kind, OrderedDict(kept))
    try:
        yield
    finally:
        for (leaf, kind), hooks in hooks_of.items():
            setattr(leaf, kind, hooks)


def _autocast(engine: Any) -> Any:
    """Autocast context in which DeepSpeed runs the model (>= 0.16.8)."""
    module = sys.modules.get("deepspeed.runtime.torch_autocast")
    enter = getattr(module, "autocast_if_enabled", None)
    return enter(engine) if enter is not None else contextlib.nullcontext()


def settings_of(engine: Any) -> Mapping[str, Any]:
    """Returns DeepSpeed's configuration as the user wrote it."""
    return getattr(engine._config, "_param_dict", {})


def overflow_check_disabled(engine: Any) -> bool:
    """Returns whether the user's configuration explicitly switches the check of bf16 gradients off."""
    config: Any = getattr(getattr(engine, "_config", None), "bfloat16_config", None)
    said: Any = getattr(config, "model_fields_set", set())
    return "check_grad_overflow" in said and not config.check_grad_overflow


def parameters_of(module: torch.nn.Module, groups: Iterable[Iterable[torch.Tensor]]) -> list[NamedTensor]:
    """Returns the parameters in registration order, then those that only the optimizer has (learnt loss weights).

    Under ZeRO stage 3, this rank's slices of them.

    Args:
        module: The model.
        groups: The optimizer's parameters, by group.
    """
    found = named_parameters(module)
    known = {item.tensor for item in found}
    found += [
        NamedTensor("parameter", f"param_groups[{number}][{place}]", parameter)
        for number, group in enumerate(groups)
        for place, parameter in enumerate(group)
        if parameter not in known
    ]
    return [_partitioned(item) for item in found]


def _partitioned(item: NamedTensor) -> NamedTensor:
    parameter: Any = item.tensor
    if not hasattr(parameter, "ds_tensor"):
        return item
    shape = tuple(parameter.ds_shape)
    if not is_on_nvme(parameter):
        return NamedTensor(item.kind, item.name, item.tensor, item.aliases, shape, _LocalSlice(parameter))
    nothing = torch.empty(0, dtype=parameter.dtype)  # what DeepSpeed puts in its place is none of its elements
    return NamedTensor(item.kind, item.name, item.tensor, item.aliases, shape, lambda: (nothing, 0), is_on_disk=True)


class _LocalSlice:
    """Returns this rank's part of a partitioned parameter, and its place in the whole.

    It is made anew only where DeepSpeed has moved the part: updates are looked at twice a step.
    """

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self._made: tuple[torch.Tensor, int] | None = None
        self._part: torch.Tensor | None = None
        self._address = 0

    def __call__(self) -> tuple[torch.Tensor, int]:
        part: torch.Tensor = self._parameter.ds_tensor
        if self._made is None or part is not self._part or part.data_ptr() != self._address:
            mine = slice_of(self._parameter)
            self._made = part.detach().view(-1)[: mine.real], mine.start
            self._part, self._address = part, part.data_ptr()
        return self._made
