"""A forward and backward pass run again, under a trace, without any effect on training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from hallo_numguard.core.frames import Origin
from hallo_numguard.tracing.nested import floating_tensors_in, whole_bytes
from hallo_numguard.tracing.tracer import Trace, trace

MAX_GRADIENT_BYTES = 1 << 28  # full gradients that are held at a time


@dataclass(frozen=True)
class Attempt:
    """Result of a rerun.

    Attributes:
        same: Whether the model's outputs were the same bits as before.
        origin: First non-finite place, or None: in the forward pass if only that was run, else in the backward.
        input_absmax: Largest finite absolute value in the inputs of the module of `origin`.
        gradient_absmax: Largest finite float16 absolute value among gradients of activations and parameters.
    """

    same: bool
    origin: Origin | None
    input_absmax: float
    gradient_absmax: float


def rerun(
    module: nn.Module,
    call: Callable[[], Any],
    outputs: Sequence[torch.Tensor],
    seeds: dict[int, torch.Tensor],
    factor: float | None,
) -> Attempt:
    """Runs a pass again.

    Gradients are asked for by name: no accumulator, no reduction, no partition is touched. They are computed in parts,
    so that full gradients of all parameters are never held at once; each part takes a pass.

    Args:
        module: Module to be traced.
        call: Repeats its call, with the same random state.
        outputs: Outputs of the original call.
        seeds: Gradients with respect to outputs, by position.
        factor: Factor that the seeds are multiplied by; None for a forward pass only.

    Returns:
        Result of the rerun. Buffers (running statistics) and the random state are as before.
    """
    parts = [[]] if factor is None else _parts(module)
    attempts = []
    for part in parts:
        with undisturbed(module):
            with trace(module, gradients=factor is not None, operations=factor is None) as tr:
                made = [tensor for _, tensor in floating_tensors_in("output", call())]
                same = _are_same(made, outputs)
                if factor is not None and same:
                    _backward(made, seeds, factor, part)
                del made
            attempts.append(_attempt(tr, tr.first_nonfinite if factor is None else tr.first_in_backward(), same))
    bad = next((attempt for attempt in attempts if attempt.origin is not None), attempts[0])
    return Attempt(
        same=all(attempt.same for attempt in attempts),
        origin=bad.origin,
        input_absmax=bad.input_absmax,
        gradient_absmax=max(attempt.gradient_absmax for attempt in attempts),
    )


def _attempt(tr: Trace, origin: Origin | None, same: bool) -> Attempt:
    frames = tr.frames
    inputs: Sequence[Any] = ()
    if origin is not None:
        inputs = next((frame.inputs for frame in frames if frame.position == origin.position), ())
    gradients = [
        tensor.record.absmax
        for frame in frames
        for part, tensor in frame.tensors()
        if part.startswith("grad_") and tensor.dtype == "float16"
    ]
    return Attempt(same, origin, max((item.record.absmax for item in inputs), default=0.0), max(gradients, default=0.0))


def _parts(module: nn.Module) -> list[list[torch.Tensor]]:
    """Trained parameters from the model's end to its beginning, as gradients become ready, in parts of limited size."""
    parts: list[list[torch.Tensor]] = [[]]
    room = MAX_GRADIENT_BYTES
    for parameter in reversed([item for item in module.parameters() if item.requires_grad]):
        size = whole_bytes(parameter)
        if parts[-1] and size > room:
            parts.append([])
            room = MAX_GRADIENT_BYTES
        parts[-1].append(parameter)
        room -= size
    return parts


def _backward(
    outputs: Sequence[torch.Tensor], seeds: dict[int, torch.Tensor], factor: float, targets: Sequence[torch.Tensor]
) -> None:
    positions = [position for position in sorted(seeds) if outputs[position].requires_grad]
    if positions and targets:
        torch.autograd.grad(
            [outputs[position] for position in positions],
            targets,
            grad_outputs=[seeds[position] * factor for position in positions],
            allow_unused=True,
        )


def _are_same(made: Sequence[torch.Tensor], recorded: Sequence[torch.Tensor]) -> bool:
    return len(made) == len(recorded) and all(
        left.shape == right.shape and torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True)
        for left, right in zip(made, recorded, strict=True)
    )


_reruns = 0  # under way


def is_rerunning() -> bool:
    """Returns whether a pass is being run again; hooks that count passes ignore it."""
    return _reruns > 0


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Leaves buffers and the random state as they were: training must not notice the pass.

    Checkpointed blocks keep their activations, because a backward pass that computes them anew (reentrant
    checkpointing) gives no gradients of single tensors.
    """
    global _reruns
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices), _without_recomputation(), torch.enable_grad():
        _reruns += 1
        try:
            yield
        finally:
            _reruns -= 1
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


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
