"""This rank's gradients before the reduction: after the sum every rank is NaN, and the guilty rank is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn.parameter import is_lazy

from hallo_numguard.guard import readable
from hallo_numguard.guard.containment import Probes
from hallo_numguard.guard.named_tensors import NamedTensor, stats_of
from hallo_numguard.guard.parameter_stats import ParameterStats, Piece
from hallo_numguard.guard.step.pending import StepOwner
from hallo_numguard.ops.table import StatsTable

COOLDOWN_STEPS = 20  # clean steps after an alarm until the hooks come off


class LocalGradients:
    """Scans every gradient as the backward pass makes it: one pass and one launch per parameter while hooks are on.

    Args:
        parameters: Parameters in the guard's order.
        when: "never", "on_alarm" (from the step after an overflow until `COOLDOWN_STEPS` were clean) or "always".
        steps: Owner of the pending step, which keeps the statistics.
        probes: Containment of failures in the user's backward pass.
    """

    def __init__(self, parameters: Sequence[NamedTensor], when: str, steps: StepOwner, probes: Probes) -> None:
        self._parameters = parameters
        self._when = when
        self._steps = steps
        self._probes = probes
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._clean_steps = 0
        self._is_muted = False

    def start(self) -> None:
        """Puts the hooks on, if they are to be there always."""
        if self._when == "always":
            self._watch()

    @property
    def is_watching(self) -> bool:
        """Whether this step's gradients were scanned, from its first backward on."""
        return bool(self._handles)

    def stats(self, device: torch.device) -> ParameterStats:
        """Returns the statistics of this rank's gradients of the step, one row per parameter."""
        seen = self._steps.pending.local_gradients
        table = StatsTable.concatenate([table for table, _ in seen] or [StatsTable.empty()])
        return stats_of(self._parameters, table.to(device), [piece for _, piece in seen])

    def largest_sum(self) -> float:
        """Returns what no element of the step's gradients, added up over micro-batches, can exceed. Synchronises."""
        sums: dict[int, float] = {}
        for table, piece in self._steps.pending.local_gradients:
            sums[piece.parameter] = sums.get(piece.parameter, 0.0) + float(table.absmax[0])
        return max(sums.values(), default=0.0)

    def agree_with(self, absmax: Mapping[int, float], micro_batch: int) -> bool:
        """Returns whether this rank's finite gradients of a micro-batch are those of a rerun. May synchronise.

        Then nothing else has contributed to them: no penalty on weights, and no hook of the user, which a rerun leaves
        out.

        Args:
            absmax: Largest finite absolute value of each parameter's gradient in the rerun, by the parameter's id.
            micro_batch: Position of the micro-batch among those that are kept.
        """
        micro_batch += self._steps.pending.calls_before
        if any(self._has_other_hooks(item.tensor) for item in self._parameters):
            return False
        by_parameter: dict[int, list[StatsTable]] = {}
        for table, piece in self._steps.pending.local_gradients:
            by_parameter.setdefault(piece.parameter, []).append(table)
        for position, tables in by_parameter.items():
            if micro_batch >= len(tables):
                return False
            table, key = tables[micro_batch], id(self._parameters[position].tensor)
            if not bool(table.any_nonfinite()) and float(table.absmax[0]) != absmax.get(key, 0.0):
                return False
        return bool(by_parameter)

    def _has_other_hooks(self, parameter: torch.Tensor) -> bool:
        return bool(set(parameter._backward_hooks or ()) - {handle.id for handle in self._handles})

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Ignores gradients for a while: those of a replay belong to no step."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def step_is_over(self, clean: bool) -> None:
        """Puts the hooks on for the next step, or takes them off."""
        self._clean_steps = self._clean_steps + 1 if clean else 0
        if self._when != "on_alarm":
            return
        if not clean:
            self._watch()
        elif self._clean_steps >= COOLDOWN_STEPS:
            self.stop()

    def parameters_were_added(self, count: int) -> None:
        """Scans the last `count` parameters' gradients as well."""
        if self._handles:
            self._hook(len(self._parameters) - count)

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self) -> None:
        if self._handles:
            return
        self._hook(0)

    def _hook(self, begin: int) -> None:
        for position, item in enumerate(self._parameters[begin:], begin):
            if item.tensor.requires_grad and not is_lazy(item.tensor):
                self._handles.append(item.tensor.register_hook(self._scan_hook(position)))

    def _scan_hook(self, position: int) -> Callable[[torch.Tensor], None]:
        @torch.utils.hooks.unserializable_hook  # else torch.save warns of it
        def scan(gradient: torch.Tensor) -> None:
            if not self._is_muted:
                self._probes.run("scan of local gradients", self._scan, position, gradient)

        return scan

    def _scan(self, position: int, gradient: torch.Tensor) -> None:
        found = readable.scan([gradient])
        rows = (found.table[row : row + 1] for row in range(len(found.table)))
        self._steps.pending.local_gradients += [(row, Piece(position, 0)) for row in rows]
