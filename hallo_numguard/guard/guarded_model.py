"""The guarded model as an integration describes it, and scans of this rank's gradients and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.optimizer_view import OptimizerView
from hallo_numguard.guard.parameter_stats import Piece
from hallo_numguard.guard.readable import UncheckedTensors
from hallo_numguard.guard.stages import Stage
from hallo_numguard.ops.table import StatsTable

Forward = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
"""Calls the model with positional and keyword arguments, as the framework does."""


def no_remarks(_: OverflowReport) -> Sequence[str]:
    """Returns no sentence about what a report names."""
    return ()


@dataclass(frozen=True)
class ScannedPieces:
    """One pass over tensors of this rank that are pieces of parameters: gradients, or optimizer state.

    Attributes:
        table: Statistics, one row per piece.
        pieces: Piece of a parameter behind each row; parameters by position in the guard's list.
        groups: Rows of each of the optimizer's parameter groups; () where they are not needed.
    """

    table: StatsTable
    pieces: Sequence[Piece]
    groups: Sequence[slice] = ()


class Routed(NamedTuple):
    """What a router of a mixture of experts has decided in a call.

    Attributes:
        logits: One row per token, one column per expert.
        chosen: Number of tokens that have chosen each expert.
        capacity: Number of tokens that an expert takes.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    capacity: int | torch.Tensor


class Router(NamedTuple):
    """A router of a mixture of experts.

    Attributes:
        name: Name of the module.
        module: The module.
        read: Returns what it has decided, from the positional arguments and the output of a call.
    """

    name: str
    module: nn.Module
    read: Callable[[Any, Any], Routed]


@dataclass(frozen=True)
class GuardedModel:
    """The model and the optimizer that an integration guards.

    Attributes:
        parameters: Parameters in registration order.
        buffers: Buffers of floating-point or complex numbers in registration order.
        sliced_gradients: Whether the ranks hold slices of the gradients; else each holds all of them.
        scan_state: Reads the optimizer's own tensors once: moments, master copies.
        sliced_state: Whether the ranks hold slices of the optimizer's tensors; else each holds all of them.
        has_masters: Whether parameters in half precision are rounded copies of others, which take the updates.
        device: Device on which ranks reduce small tensors.
        module: Module whose forward is called in training, to name its arguments. None if its calls are not seen.
        forward: Calls the module once more, as the framework does; None if that is impossible.
        forward_compiled: Does the same, compiled as the original call if that was; None if it never is.
        recover: Puts the framework's own state in order after such a call, and its backward pass; called on all ranks,
            and told whether it has failed midway on any.
        gathers_parameters: Whether the module computes with other tensors than its parameters, gathered from shards.
        settings: The framework's configuration, for reproduction bundles.
        can_go_back: Returns whether the integration can call `go_back` when a step is over; the same on every rank.
        called_directly: Context in which what wraps the module only calls it, as a repeated step must not be reduced.
        is_compiled: Returns whether calls of the module are compiled.
        unchecked: Tensors that scans have left out.
        optimizer: What is read of the optimizer that makes the updates.
        exchanges_figures: Whether the session has to add up the figures of ranks that hold slices of the gradients;
            else whoever calls `before_step` has them of the whole model.
        also: Frozen modules that feed the model, by name; see `feeding_modules`.
        in_global_names: Returns a text of this rank with names that mean the same on all ranks.
        run_facts: Facts about the run for its reports: "framework", "zero_stage".
        stage: This rank's stage of a pipeline, whose layers, batch and loss are on different ranks; else None.
        remarks: Returns sentences about what a report names, the same on all ranks.
        routers: The routers of its mixtures of experts.
    """

    parameters: list[NamedTensor]
    buffers: list[NamedTensor]
    sliced_gradients: bool
    scan_state: Callable[[], ScannedPieces]
    sliced_state: bool
    device: torch.device
    module: nn.Module | None = None
    forward: Forward | None = None
    forward_compiled: Forward | None = None
    recover: Callable[[bool], None] = lambda _: None
    has_masters: bool = False
    gathers_parameters: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    can_go_back: Callable[[], bool] = lambda: False
    called_directly: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_compiled: Callable[[], bool] = lambda: False
    unchecked: UncheckedTensors = field(default_factory=UncheckedTensors)
    optimizer: OptimizerView = field(default_factory=OptimizerView)
    exchanges_figures: bool = False
    also: Mapping[str, nn.Module] = field(default_factory=dict)
    in_global_names: Callable[[str], str] = str
    run_facts: Mapping[str, str | int] = field(default_factory=dict)
    stage: Stage | None = None
    remarks: Callable[[OverflowReport], Sequence[str]] = no_remarks
    routers: Sequence[Router] = ()

    def note_unchecked(self) -> None:
        """Notes the parameters and buffers inside of which nothing can be read."""
        for item in (*self.parameters, *self.buffers):
            self.unchecked.add_if_unread(item.name, item.held()[0])

    def with_first_name(self, offender: Offender) -> Offender:
        """Returns the offender under the first name of a tied weight."""
        for weight in (*self.parameters, *self.buffers):
            if offender.name in weight.aliases:
                return replace(offender, name=weight.name, aliases=weight.aliases)
        return offender
