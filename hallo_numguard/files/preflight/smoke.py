"""A forward and backward pass on one small batch before training, without lasting effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.findings import Finding, PreflightReport
from hallo_numguard.tracing.nested import floating_tensors_in
from hallo_numguard.tracing.rerun import Match, rerun, undisturbed

_MAX_LOSS_RATIO = 2.0  # to the loss when the checkpoint was saved

LossFunction = Callable[[Any], torch.Tensor]


class NoLoss(Exception):
    """The model's output has neither a loss nor a tensor to make one of, and no loss function was given."""


@dataclass(frozen=True)
class _Pass:
    loss: float
    outputs: list[torch.Tensor]
    seeds: dict[int, torch.Tensor]
    is_stand_in: bool = False


def check(
    module: nn.Module, call: Callable[[], Any], loss_fn: LossFunction | None, expected_loss: float | None
) -> PreflightReport:
    """Runs a forward and a backward pass, and checks every activation and gradient.

    Three forward passes, and one to a few backward passes. Weights, buffers, gradients, random number generators and
    the optimizer stay unchanged.

    Args:
        module: The model.
        call: Calls the model with the batch, and returns its output.
        loss_fn: Computes the loss from the output (default: the output, or its `loss`; where there is none, the mean
            of its squares stands in for it).
        expected_loss: Loss when the checkpoint was saved.
    """
    try:
        first = _pass(module, call, loss_fn)
        return _judge(module, call, first, expected_loss)
    except NoLoss as error:
        return PreflightReport(unchecked=(f"Smoke step: {error}.",))
    except Exception as error:  # noqa: BLE001 - the model's own code, which would fail in training too
        message = f"the smoke step failed: {type(error).__name__}: {error}"
        return PreflightReport(
            (Finding("smoke", message, severity="error", remedy="Training would fail in the same way."),)
        )


def call_with(module: Callable[..., Any], batch: Any) -> Any:
    """Calls a model with a batch: a dict as keyword arguments, a tuple or list as arguments, else as one argument."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _pass(module: nn.Module, call: Callable[[], Any], loss_fn: LossFunction | None) -> _Pass:
    with undisturbed(module):
        output = call()
        loss, is_stand_in = _loss(output, loss_fn)
        outputs = [tensor for _, tensor in floating_tensors_in("output", output)]
        wanted = {position: tensor for position, tensor in enumerate(outputs) if tensor.requires_grad}
        given = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True) if wanted else ()
        seeds = {place: seed for place, seed in zip(wanted, given, strict=True) if seed is not None}
        return _Pass(float(loss.detach()), [tensor.detach() for tensor in outputs], seeds, is_stand_in)


def _loss(output: Any, loss_fn: LossFunction | None) -> tuple[torch.Tensor, bool]:
    """The loss, and whether it stands in for one that the model does not return."""
    loss = loss_fn(output) if loss_fn is not None else output
    if loss_fn is None and isinstance(output, Mapping):
        loss = output.get("loss")
    elif loss_fn is None and not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        outputs = [tensor for _, tensor in floating_tensors_in("output", output) if tensor.requires_grad]
        if loss_fn is not None or not outputs:
            raise NoLoss("the model returns no loss: give loss_fn, which computes it from the output")
        return torch.stack([tensor.square().mean().float() for tensor in outputs]).sum(), True
    return loss.reshape(()), False


def _judge(module: nn.Module, call: Callable[[], Any], first: _Pass, expected_loss: float | None) -> PreflightReport:
    findings = []
    is_finite = math.isfinite(first.loss)
    second = rerun(module, call, first.outputs, first.seeds, 1.0 if is_finite else None)
    if not is_finite:
        origin = second.origin or "every module's output is finite, so the loss function is the origin"
        message = f"smoke step: the loss is {_words(first.loss)}: {origin}"
        findings.append(_error(message, "" if second.origin is None else second.origin.name))
    elif second.origin is not None:
        findings.append(
            _error(f"smoke step: the loss is finite, its gradients are not: {second.origin}", second.origin.name)
        )
    elif expected_loss is not None and not first.is_stand_in and first.loss > _MAX_LOSS_RATIO * abs(expected_loss):
        findings.append(
            Finding(
                "smoke",
                f"smoke step: the loss is {first.loss:.4g}, and was {expected_loss:.4g} when the checkpoint was saved",
                remedy="Check that the weights were loaded (names, strict=False), and that the batch is a normal one.",
            )
        )
    if second.match is not Match.SAME:
        message = "smoke step: the model returns other values for the same batch and random numbers"
        findings.append(Finding("smoke", message, severity="info"))
    trained = sum(parameter.requires_grad for parameter in module.parameters())
    what = "mean square of the output (the model returns no loss)" if first.is_stand_in else "loss"
    checked = f"Smoke step: {what} {_words(first.loss)}; every activation, and the gradients of {trained} parameters"
    return PreflightReport(tuple(findings), (checked,))


def _error(message: str, name: str) -> Finding:
    remedy = "Training would begin like this: look at that module's weights and inputs (ng.trace)."
    return Finding("smoke", message, severity="error", name=name, remedy=remedy)


def _words(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else ("NaN" if math.isnan(loss) else "Inf")
