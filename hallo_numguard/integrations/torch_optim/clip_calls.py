"""Calls of torch's own clipping, seen by one patch that all guards of the process share.

`clip_grad_norm_` computes a norm, and multiplies every gradient by it: if it is NaN, no gradient shows any more where
the NaN began. So the gradients are read before. Scripts also look at the norm, and leave out their step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn import utils
from torch.nn.utils import clip_grad

from hallo_numguard.integrations.shared_patch import SharedPatch


class ClipObserver(Protocol):
    """Is told of torch's clipping. Must not raise, but for errors that the policy raises."""

    def before_norm(self, gradients: Sequence[torch.Tensor]) -> None:
        """The norm of these gradients is about to be computed."""

    def after_norm(self, norm: torch.Tensor) -> None:
        """It has been computed."""

    def before_scaling(self) -> None:
        """Gradients are about to be multiplied."""

    def after_scaling(self) -> None:
        """Gradients were multiplied."""


def observe(observer: ClipObserver) -> None:
    """Makes an observer see the calls."""
    for patch in _patches:
        patch.add(observer)


def ignore(observer: ClipObserver) -> None:
    """Makes an observer see no more calls."""
    for patch in _patches:
        patch.discard(observer)


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _norm(
    observers: Sequence[ClipObserver], original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any
) -> Any:
    """Runs in place of `get_total_norm`, which `clip_grad_norm_` calls too."""
    if torch.compiler.is_compiling():
        return original(tensors, *args, **kwargs)
    tensors = _listed(tensors)
    for observer in observers:
        observer.before_norm(tensors)
    norm = original(tensors, *args, **kwargs)
    for observer in observers:
        observer.after_norm(norm)
    return norm


def _scaling(observers: Sequence[ClipObserver], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in place of `clip_grads_with_norm_`, which `clip_grad_norm_` calls too."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    for observer in observers:
        observer.before_scaling()
    result = original(*args, **kwargs)
    for observer in observers:
        observer.after_scaling()
    return result


def _clipping(
    observers: Sequence[ClipObserver], original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any
) -> Any:
    """Runs in place of `clip_grad_norm_` of torch < 2.6, which does both at once."""
    if torch.compiler.is_compiling():
        return original(parameters, *args, **kwargs)
    parameters = _listed(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for observer in observers:
        observer.before_norm(gradients)
        observer.before_scaling()
    norm = original(parameters, *args, **kwargs)
    for observer in observers:
        observer.after_norm(norm)
        observer.after_scaling()
    return norm


if hasattr(clip_grad, "_get_total_norm"):
    _patches: list[SharedPatch[ClipObserver]] = [
        SharedPatch([(clip_grad, "_get_total_norm"), (utils, "get_total_norm")], _norm),
        SharedPatch([(clip_grad, "_clip_grads_with_norm_"), (utils, "clip_grads_with_norm_")], _scaling),
    ]
else:
    _patches = [SharedPatch([(clip_grad, "clip_grad_norm_"), (utils, "clip_grad_norm_")], _clipping)]
