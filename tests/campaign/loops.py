"""Ways to write a training loop around an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param

Losses = Sequence[Callable[[], torch.Tensor]]
"""For each micro-batch, what calls the engine and returns the loss."""


def _backward(engine: Any, losses: Losses) -> torch.Tensor:
    for compute in losses:
        loss = compute()
        engine.backward(loss)
    return loss


def _plain(engine: Any, losses: Losses) -> torch.Tensor:
    for compute in losses:
        loss = compute()
        engine.backward(loss)
        engine.step()
    return loss


def _boundary(engine: Any, losses: Losses) -> torch.Tensor:
    for number, compute in enumerate(losses, 1):
        engine.set_gradient_accumulation_boundary(number == len(losses))
        loss = compute()
        engine.backward(loss)
    engine.step()
    return loss


def _no_sync(engine: Any, losses: Losses) -> torch.Tensor:
    with engine.no_sync():
        _backward(engine, losses[:-1])
    return _plain(engine, losses[-1:])


def _step_at_end(engine: Any, losses: Losses) -> torch.Tensor:
    loss = _backward(engine, losses)
    engine.step()
    return loss


def _coalesce(engine: Any, losses: Losses) -> torch.Tensor:
    with engine.coalesce_grad_reduction():
        loss = _backward(engine, losses)
    engine.step()
    return loss


def _tensor_backward(engine: Any, losses: Losses) -> torch.Tensor:
    loss = losses[0]()
    engine.scale(loss).backward()
    engine.step()
    return loss


def _evaluation(engine: Any, losses: Losses) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        losses[0]()
    engine.train()
    return _plain(engine, losses)


def _gathered(engine: Any, losses: Losses) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        if engine.global_rank == 0:
            engine.module.norm.bias.data.mul_(0.5)
    return _plain(engine, losses)


def _get_and_set(engine: Any, losses: Losses) -> torch.Tensor:
    loss = _backward(engine, losses)
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in trained:
        safe_get_full_grad(parameter)
    engine.step()
    for parameter in trained:
        safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter) * 0.99)
    return loss


LOOPS = {
    "plain": _plain,
    "boundary": _boundary,
    "no_sync": _no_sync,
    "step_at_end": _step_at_end,
    "coalesce": _coalesce,
    "tensor_backward": _tensor_backward,
    "evaluation": _evaluation,
    "gathered": _gathered,
    "get_and_set": _get_and_set,
}
