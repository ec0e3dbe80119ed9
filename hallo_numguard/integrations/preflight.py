"""Preflight of a run from its engine or model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import PreflightReport
from hallo_numguard.files.preflight import run as checking
from hallo_numguard.files.preflight.loaded import LoadedModel
from hallo_numguard.files.preflight.run import Paths, PreflightInputs, as_paths, read_config
from hallo_numguard.files.preflight.run_spec import RunSpec
from hallo_numguard.files.scan.scan import Progress
from hallo_numguard.integrations import engine_of
from hallo_numguard.ops.formats import dtype_name


def preflight(
    target: Any = None,
    *,
    model: Paths | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    world_size: int | None = None,
    zero_stage: int | None = None,
    dtype: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    batch: Any = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    expected_loss: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Checks a run before its first step, as far as the arguments allow; training is not affected.

    (a) The files against their manifest; (b) every value in them; (c) names, shapes and values of the model against
    them, also where `strict=False` hides differences; (d) the optimizer's state: present, complete, plausible, equal
    steps, equal groups; (e) number of processes, ZeRO stage and dtype against the checkpoint's; (f) the loss scaler in
    it; (g) launcher and precision; (h) with `batch`, a forward and backward pass in which every tensor is checked, and
    the loss compared with the one saved.

    Args:
        target: A `torch.nn.Module`, a `deepspeed.DeepSpeedEngine` or an `accelerate.Accelerator` after `prepare`; None
            for files alone. With an engine and `batch` every rank must call it; each reads the files.
        model: Files or folders of the initial weights.
        checkpoint: Folder to resume from.
        manifest: Manifest of these files. Default: the one beside the files.
        world_size: Number of processes of the run. Default: the engine's.
        zero_stage: DeepSpeed's ZeRO stage. Default: the engine's.
        dtype: Training dtype of the weights. Default: the engine's.
        config: DeepSpeed's configuration, or its file. Default: the engine's.
        batch: Small batch. A dict is given to the model by name, a tuple or list by position.
        loss_fn: Computes the loss from the model's output, if that contains none.
        expected_loss: Loss of such a batch. Default: the one in the checkpoint of a `CheckpointKeeper`.
        threads: Reader threads. Default: number of CPUs.
        progress: Called with the number of bytes just read, and the total.

    Returns:
        Findings with severity, evidence and remedy; `ok`, `exit_code`, `to_dict()`.

    Raises:
        InvalidInput: If `target` is none of these, or the configuration cannot be read.

    Cost: (a) and (b) read every file once each; (h) makes three forward passes.
    """
    engine = engine_of(target)
    module = _module(target, engine)
    said = read_config(config)
    spec = RunSpec(
        world_size=_world_size() if world_size is None and engine is not None else world_size,
        zero_stage=zero_stage if engine is None else engine.zero_optimization_stage(),
        dtype=_dtype(module) if dtype is None else dtype,
        config=said if engine is None or said else _settings(engine),
        param_groups=() if engine is None else _groups(engine),
        environment=None if module is None else dict(os.environ),
    )
    inputs = PreflightInputs(
        as_paths(model),
        None if checkpoint is None else as_paths(checkpoint)[0],
        None if manifest is None else as_paths(manifest)[0],
        spec,
        None if module is None else loaded_model(module, engine),
        batch,
        loss_fn,
        expected_loss,
    )
    try:
        return checking.run(inputs, threads, progress)
    finally:
        if batch is not None and engine is not None:
            _release_weights(engine.optimizer)


def loaded_model(module: nn.Module, engine: Any = None) -> LoadedModel:
    """Returns the names, shapes and tensors of a model, for comparison with files."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state = module.state_dict(keep_vars=True)
    kept = set(state)
    tensors = {name: tensor for name, tensor in named if name in kept}
    tensors.update((name, tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor))
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
    unsaved = frozenset(name for name, _ in named if name not in kept)
    return LoadedModel(module, shapes, tensors, aliases, unsaved, module if engine is None else _forward(engine))


def _release_weights(optimizer: Any) -> None:
    """Releases the weights that ZeRO-3 gathered for the smoke step, as its own step does after a full backward pass.

    Small weights, which stay whole, are gathered again.
    """
    if not hasattr(optimizer, "parameter_offload"):
        return
    optimizer.parameter_offload.partition_all_parameters()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _forward(engine: Any) -> Callable[..., Any]:
    from hallo_numguard.integrations.deepspeed.engine import call_module

    return lambda *args, **kwargs: call_module(engine, args, kwargs)


def _module(target: Any, engine: Any) -> nn.Module | None:
    module = _prepared(target) if engine is None else engine.module
    if module is not None and not isinstance(module, nn.Module):
        raise InvalidInput(
            "preflight() takes a torch.nn.Module, a DeepSpeedEngine, an accelerate.Accelerator after prepare() or "
            f"nothing, got {type(target).__name__}"
        )
    return module


def _prepared(target: Any) -> Any:
    """The model that an Accelerator without DeepSpeed prepared, several as a list of modules; else the target."""
    models = getattr(target, "_models", None) if hasattr(target, "unwrap_model") else None
    if not models:
        return target
    unwrapped = [target.unwrap_model(model) for model in models]
    return unwrapped[0] if len(unwrapped) == 1 else nn.ModuleList(unwrapped)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _dtype(module: nn.Module | None) -> str | None:
    """The dtype of most parameters."""
    dtypes = [] if module is None else [dtype_name(p.dtype) for p in module.parameters()]
    return max(sorted(set(dtypes)), key=dtypes.count, default=None)


def _settings(engine: Any) -> Mapping[str, Any]:
    from hallo_numguard.integrations.deepspeed.engine import settings_of

    return settings_of(engine)


def _groups(engine: Any) -> tuple[Mapping[str, Any], ...]:
    groups = getattr(engine.optimizer, "param_groups", ())
    return tuple({key: value for key, value in group.items() if key != "params"} for group in groups)
