"""The calls of the model in the pending step, to be examined after an overflow."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import clip
from hallo_numguard.guard.named_tensors import NamedTensor, scan_tensors
from hallo_numguard.guard.parameter_stats import ParameterStats
from hallo_numguard.guard.readable import UncheckedTensors, is_plain, readable_tensors
from hallo_numguard.guard.stages import Stage
from hallo_numguard.guard.step.model_call import ModelCall, SeedCounter
from hallo_numguard.guard.step.pending import StepOwner
from hallo_numguard.guard.step.step_call import StepCall
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.autograd_graph import names_after
from hallo_numguard.tracing.model_state import Snapshot, StateRecorder
from hallo_numguard.tracing.nested import contents_of_items

MAX_NAME_BYTES = 1000
MAX_KEPT_BYTES = 2 << 30  # of a step: its batches, the model's outputs and their gradients


class Batch:
    """The calls of the pending step, in order: one per micro-batch.

    Args:
        model: Module that is called; None if unknown.
        steps: Owner of the pending step.
        unchecked: Takes the arguments inside of which nothing can be read.
        stage: Stage of a pipeline, whose calls are given what another stage has made; None for a whole model.
    """

    def __init__(
        self, model: nn.Module | None, steps: StepOwner, unchecked: UncheckedTensors, stage: Stage | None = None
    ) -> None:
        self._model = model
        self._names = _argument_names(model)
        self._steps = steps
        self._unchecked = unchecked
        self._stage = stage
        self._tolerated: set[str] = set()
        self._state = None if model is None else StateRecorder(model)
        self._arrivals = SeedCounter()

    @property
    def calls(self) -> Sequence[ModelCall]:
        """The calls that are kept."""
        return self._steps.pending.calls

    @property
    def calls_before(self) -> int:
        """Number of the step's calls before those that are kept."""
        return self._steps.pending.calls_before

    @property
    def step_calls(self) -> Sequence[StepCall]:
        """Calls of the function that makes the loss."""
        return self._steps.pending.step_calls

    @property
    def seen(self) -> bool:
        """Whether there are calls, with arguments that have not changed since."""
        return bool(self.calls) and not any(call.changed for call in self.calls)

    @property
    def seeds_seen(self) -> int:
        """Number of gradients that have arrived at outputs of the model so far."""
        return self._arrivals.count

    @property
    def sees_seeds(self) -> bool:
        """Whether gradients that reach the model arrive at outputs that are waited at."""
        return bool(self.calls) and all(call.is_hooked for call in self.calls)

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the arguments of a forward pass, if it is one of training."""
        if not torch.is_grad_enabled():
            return
        contents = contents_of_items(self._named(args, kwargs))
        state = Snapshot(()) if self._state is None else self._state.before_call(contents)
        copies_seeds = self._stage is not None and not self._stage.is_last  # received in one buffer, again and again
        call = ModelCall(args, kwargs, contents, state, arrivals=self._arrivals, copies_seeds=copies_seeds)
        self._steps.pending.add_call(call)

    def note_output(self, output: Any) -> None:
        """Records the output of the last call; forgets the oldest calls where all take much memory."""
        if not torch.is_grad_enabled() or not self.calls:
            return
        if self._state is not None:
            self._state.after_call()
        self.calls[-1].note_output(output)
        room = MAX_KEPT_BYTES
        for call in reversed(self.calls):
            room -= call.nbytes
            if room < 0:
                call.forget()

    def buffer_before(self, buffer: torch.Tensor) -> torch.Tensor | None:
        """Returns a buffer's elements before the step's first call; None if no call is known to change them."""
        return self.calls[0].state.copy_of(buffer) if self.calls else None

    def restore_statistics(self) -> list[str]:
        """Sets buffers that were finite before the step's first call, and are not now, to what they were.

        Returns:
            Their names. Synchronises.
        """
        if self._model is None or not self.calls:
            return []
        restored = self.calls[0].state.restore_poisoned()
        prefixes = {id(part._buffers): name for name, part in self._model.named_modules()}
        return [f"{prefixes[id(owner)]}.{key}".lstrip(".") for owner, key in restored if id(owner) in prefixes]

    def tensors(self, micro_batch: int) -> list[NamedTensor]:
        """Returns the tensors of a call that hold floating-point numbers, named by the model's own argument names.

        What comes from another stage of a pipeline is none of the batch.
        """
        contents = self.calls[micro_batch].contents.tensors
        is_received = (lambda _: False) if self._stage is None else self._stage.is_received
        found = readable_tensors([(name, tensor) for name, tensor in contents if not is_received(name)])
        tensors = [NamedTensor("input", clip(name, MAX_NAME_BYTES), tensor) for name, tensor in found]
        return [item for item in tensors if not self._unchecked.add_if_unread(f"input {item.name}", item.tensor)]

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
        named = [*zip(self._names, args, strict=False), *kwargs.items()]
        return named + [(f"input {place}", value) for place, value in enumerate(args) if place >= len(self._names)]

    def stand_ins_for_losses(self) -> list[torch.Tensor]:
        """Returns one number per call in place of its unknown loss: NaN if its output is not finite, else 0.

        Returns [] if the output of any call is unknown. -Inf alone is how logits are masked.
        """
        if any(call.outputs is None for call in self.calls):
            return []
        return [_as_number(call.outputs or ()) for call in self.calls]

    def seeds_are_finite(self) -> bool:
        """Returns whether gradients have arrived at the outputs of every call, all of them finite. Synchronises."""
        seeds = [seed for call in self.calls for seed in call.seeds.values()]
        has_all = bool(self.calls) and all(call.seeds for call in self.calls)
        return has_all and not bool(multi_tensor_stats(seeds).found_inf())

    def operations_after_the_model(self) -> list[str]:
        """Returns the names of the operations that made the last loss of what the model returned; see `names_after`."""
        numbers = [number for call in self.calls for number in call.output_nodes]
        return names_after(self._steps.pending.loss_node, numbers) if numbers else []

    def tolerate(self, names: Sequence[str]) -> None:
        """Ignores these inputs from now on: they held non-finite values in a clean step."""
        self._tolerated.update(names)

    def losses_before(self, count: int) -> int | None:
        """Returns how many of so many losses belong to calls that are not kept; None if not every call has one."""
        before = count - len(self.calls)
        return before if before in (0, self.calls_before) else None

    def bad_samples(self, name: str, micro_batch: int) -> tuple[int, int] | None:
        """Returns how many samples of a call's tensor are not finite, and how many it has; None if it has none."""
        tensor = next((item.tensor for item in self.tensors(micro_batch) if item.name == name), None)
        if tensor is None or tensor.dim() < 2 or not is_plain(tensor):
            return None
        bad = int((~tensor.detach().flatten(1).isfinite()).any(dim=1).sum())
        return bad, len(tensor)

    def first_nonfinite(self, rank: int, losses: Sequence[bool]) -> tuple[Offender, int] | None:
        """Returns the first input that may have made a loss non-finite, and its micro-batch; None if there is none.

        Entries of -Inf alone do not count, as in masks, nor do inputs that were not finite in clean steps.

        Args:
            rank: Global rank of this process.
            losses: Whether the loss of each micro-batch was finite. Ignored if not every call has one.
        """
        before = self.losses_before(len(losses))
        for micro_batch in range(len(self.calls)):
            if before is not None and losses[micro_batch + before]:
                continue
            tensors = self.tensors(micro_batch)
            stats = scan_tensors(tensors)
            for position in stats.bad_positions():
                if tensors[position].name not in self._tolerated and not stats.only_negative_infinity(position):
                    return tensors[position].offender(stats, position, rank), micro_batch
        return None

    def ranges(self) -> tuple[list[str], ParameterStats]:
        """Reads the last call's tensors once: their names and statistics."""
        tensors = self.tensors(len(self.calls) - 1) if self.calls else []
        return [item.name for item in tensors], scan_tensors(tensors)


def _as_number(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    table = multi_tensor_stats(outputs)
    return torch.where((table.nan + table.pos_inf).sum() > 0, torch.nan, 0.0)


def _argument_names(model: nn.Module | None) -> list[str]:
    """Names of the model's positional arguments; [] where they are unknown."""
    try:
        parameters = inspect.signature(model.forward).parameters.values() if model is not None else ()
    except (TypeError, ValueError):
        return []
    return [item.name for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
