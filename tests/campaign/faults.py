"""Plants the campaign's faults into a model that is trained, and collects what its guard has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import hallo_numguard as ng

from campaign.cases import Case, Seen
from campaign.models import WITH_EXPERTS

INPUT = {model: ("features", (2, 3, 1)) for model in WITH_EXPERTS} | {"unet": ("noisy", (2, 1, 6, 4))}
BUFFER = {model: (0, 1) for model in WITH_EXPERTS} | {"unet": (1,)}
STATE = (3, 5)
GRADIENT = (7, 2)


def build(case: Case, kind: type[nn.Module] | None = None) -> Any:
    """Returns the case's model, with the damage that it has before the run."""
    torch.manual_seed(0)
    model = (kind or WITH_EXPERTS[case.model])()
    if case.fault == "buffer":
        buffer = dict(model.named_buffers()).get(model.buffer)
        if buffer is not None:  # else another stage has it
            buffer.view(-1)[1] = float("nan")
    return model


def plant(case: Case, target: Any, model: Any) -> tuple[str, tuple[int, ...]]:
    """Plants what hooks can plant.

    Args:
        case: Case of the campaign.
        target: What `ng.inject` takes: an engine, or what has a module and an optimizer.
        model: Model of `build`.

    Returns:
        Name that the report must give, and index.
    """
    name, index = _plant(case, target, model)
    if case.model == "experts" and case.fault != "optimizer_state":  # that is planted on both ranks, so in expert 1 too
        part = case.culprit % min(2, case.world)
        name = name.replace(".deepspeed_experts.1", f".deepspeed_experts.{2 * part + 1}")
    if case.way == "autotp" and case.fault in ("weight", "gradient"):  # in the second of two parts, cut by rows
        index = (index[0] + shapes_of(model)[name][0], index[1])
    return name, index


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter: of this rank's part, where tensor parallelism cuts it."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in model.named_parameters()
    }


def _plant(case: Case, target: Any, model: Any) -> tuple[str, tuple[int, ...]]:
    shapes = shapes_of(model)
    # A slice has one owner, a copy or a part may be bad on one rank only.
    mine = None if case.stage == 3 and case.way != "autotp" else case.culprit

    def inject(kind: str, name: str | None, **options: Any) -> None:
        ng.inject(target, kind, name, step=case.faulty_call, **options)

    if case.fault in ("weight", "frozen_weight"):
        name = model.trainable if case.fault == "weight" else model.frozen
        index = tuple(size - 1 for size in shapes.get(name) or model.shapes[name])  # in the last rank's slice
        inject("parameter", name, index=index, rank=mine)
        return name, index
    if case.fault == "buffer":
        return model.buffer, BUFFER[case.model]
    if case.fault == "optimizer_state":
        inject("optimizer_state", model.trainable, index=STATE)
        return model.trainable, STATE
    if case.fault == "input":
        name, index = INPUT[case.model]
        if case.way == "pipeline":  # damaged where batches are made
            return "forward_input[1]", index
        inject("input", None, index=index, rank=case.culprit)
        return name, index
    if case.fault in ("gradient", "reduction"):
        value, rank = (float("nan"), case.culprit) if case.fault == "gradient" else (40000.0, None)
        inject("gradient", model.trainable, index=GRADIENT, value=value, rank=rank)
        return model.trainable, GRADIENT
    if case.has_large_weight:
        inject("parameter", model.trainable, index=(0, 0), value=60000.0, rank=mine)
    elif case.fault == "forward":
        inject("activation", model.module, value=float("inf"), rank=case.culprit)
    return {"forward": model.module, "backward": model.trapped}.get(case.fault, ""), ()


def config_of(case: Case) -> ng.GuardConfig:
    """Returns the guard's configuration."""
    return ng.GuardConfig(local_gradients="always" if case.fault in ("gradient", "reduction") else "on_alarm")


def observed(
    guard: Any,
    reports: Sequence[ng.OverflowReport],
    raised: bool,
    planted: tuple[str, tuple[int, ...]],
    finite: bool,
    prefix: str = "",
) -> Seen:
    """Returns what a rank has seen.

    Args:
        guard: Guard after the run.
        reports: Reports that `on_overflow` was given.
        raised: Whether the guard ended the run.
        planted: Result of `plant`.
        finite: Whether the weights are finite at the end.
        prefix: What stands before the model's names in the reports.
    """
    report, last = (reports[0] if reports else None), guard.last_report
    first = report and report.first
    return Seen(
        verdict=report and report.verdict.value,
        provisional=report is not None and report.provisional,
        recoverable=report.recoverable if report else None,
        first=first and (first.kind, first.name.removeprefix(prefix), first.index, first.rank),
        applied=tuple(record.applied for record in guard.history),
        raised=raised,
        findings=tuple((finding.kind, finding.name.removeprefix(prefix)) for finding in guard.findings),
        last=(last.verdict.value, last.provisional) if last else (None, False),
        finite=finite,
        planted=planted,
        named_scale=reports[-1].settles_at if reports else None,
        settled_at=guard.history[-1].loss_scale,
    )
