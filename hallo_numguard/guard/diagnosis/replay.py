"""Replay of a bad batch by all ranks together: which module went wrong, and whether a lower loss scale would help."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.documents import decode
from hallo_numguard.core.frames import Origin
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import Ranks, clip
from hallo_numguard.guard.diagnosis.evidence import Replayed
from hallo_numguard.guard.guarded_model import Forward
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.model_call import ModelCall
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.capture import Captured, NotCaptured, capture
from hallo_numguard.tracing.rerun import Attempt, rerun

_log = logging.getLogger("hallo_numguard")

LARGEST_HALF = float(torch.finfo(torch.float16).max)
MAX_FURTHER_HALVINGS = 3  # below the scale that should be low enough
MAX_NAME_BYTES = 300  # of a name sent to other ranks
MAX_LINE_BYTES = 400
_NONE = 1 << 20


@dataclass(frozen=True)
class _Answer:
    """Result of one pass, the same on every rank."""

    done: bool
    differing_ranks: int
    differing_rank: int
    bad_ranks: int
    origin_text: str | None
    absmax_power: int  # minimum over the ranks: gradients fit if multiplied by 2 to this power

    @property
    def failure_reason(self) -> str:
        if not self.done:
            return "the batch could not be run again (its own error is in the log)"
        return "run again, the model returned something else" if self.differing_ranks else ""


class Replayer:
    """Runs passes of the pending step again.

    All ranks must call each method in the same step: they reduce, and under ZeRO stage 3 the model's forward gathers
    its weights.

    Args:
        module: Module to be traced.
        forward: Calls the module as the framework does.
        batch: Calls of the pending step.
        ranks: Ranks among which gradients are reduced.
        device: Device on which ranks reduce small tensors.
    """

    def __init__(self, module: nn.Module, forward: Forward, batch: Batch, ranks: Ranks, device: torch.device) -> None:
        self._module = module
        self._forward = forward
        self._batch = batch
        self._ranks = ranks
        self._device = device

    def rerun_bad_loss(self, losses: Sequence[bool]) -> Replayed:
        """Reruns the first micro-batch whose loss was not finite; all calls, where one loss comes from several.

        Args:
            losses: Whether the loss of each micro-batch on this rank was finite.
        """
        calls = self._ranks.lowest(len(self._batch.calls), self._device)
        a_call_a_loss = self._ranks.lowest(int(len(losses) == len(self._batch.calls)), self._device) == 1
        first = next((position for position, finite in enumerate(losses) if not finite), _NONE)
        micro_batch = self._ranks.lowest(first, self._device)
        suspects = [micro_batch] if a_call_a_loss else range(calls)
        failure_reason = self._reason_not_to_run(suspects[-1] + 1 if suspects else 0)
        if failure_reason:
            return Replayed(failure_reason)
        found = Replayed()
        for position in suspects:
            found = self._replayed(self._run(position, None), position)
            if found.failure_reason or found.origin is not None:
                break
        return found

    def rerun_bad_gradients(self, scale: float) -> Replayed:
        """Reruns the step's micro-batches until one has gradients that are not finite, then searches for a loss scale.

        Args:
            scale: The loss scale.
        """
        count = self._ranks.lowest(len(self._batch.calls), self._device)
        failure_reason = self._reason_not_to_run(count)
        if failure_reason:
            return Replayed(failure_reason)
        seeds = [seed for call in list(self._batch.calls)[:count] for seed in call.seeds.values()]
        if self._ranks.highest(int(multi_tensor_stats(seeds).found_inf()), self._device):
            return Replayed(
                "the gradient that reached the model's output was not finite, so it was made after the model"
            )
        for micro_batch in range(count):
            answer = self._run(micro_batch, 1.0)
            found = self._replayed(answer, micro_batch)
            if answer.failure_reason:
                return found
            if answer.bad_ranks:
                return self._at_lower_scales(found, scale) if scale > 1 else found
        return Replayed(micro_batch=count - 1)

    def call(self, micro_batch: int) -> ModelCall | None:
        """Returns a call of the step; None if it was not kept, or has changed since."""
        calls = self._batch.calls
        return calls[micro_batch] if micro_batch < len(calls) and not calls[micro_batch].changed else None

    def capture(self, name: str, number: int, micro_batch: int) -> Captured | str:
        """Reruns a micro-batch and captures one call of one module.

        Args:
            name: Name of the module.
            number: Number of its calls before that one.
            micro_batch: Position of the micro-batch in the step.

        Returns:
            The call, or the reason why it could not be captured.
        """
        failure_reason = self._reason_not_to_run(micro_batch + 1)
        if failure_reason:
            return failure_reason
        call = self._batch.calls[micro_batch]
        try:
            return capture(self._module, name, number, self._forward_of(call), call.seeds)
        except NotCaptured as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the model's own code; training goes on
            return f"the batch could not be run again: {error}"

    def _at_lower_scales(self, found: Replayed, scale: float) -> Replayed:
        unscaled = self._run(found.micro_batch, 1.0 / scale)
        if unscaled.failure_reason:
            return found
        if unscaled.bad_ranks:
            return replace(self._replayed(unscaled, found.micro_batch), finite_unscaled=False)
        expected_power = min(unscaled.absmax_power, round(math.log2(scale)) - 1)
        for power in range(expected_power, max(expected_power - MAX_FURTHER_HALVINGS, 0), -1):
            if not self._run(found.micro_batch, 2.0**power / scale).bad_ranks:
                return replace(found, finite_unscaled=True, settles_at=2.0**power)
        return replace(found, finite_unscaled=True, settles_at=1.0)

    def _reason_not_to_run(self, count: int) -> str:
        """Why these passes cannot be repeated, agreed by all ranks; "" if they can."""
        calls = list(self._batch.calls)[:count]
        able = 0 < count <= len(self._batch.calls) and all(_is_complete(call) for call in calls)
        if self._ranks.lowest(int(able), self._device) == 1:
            return ""
        return "the batch was not seen, was changed since, or its outputs were too large to keep"

    def _run(self, micro_batch: int, factor: float | None) -> _Answer:
        attempt: Attempt | None = None
        try:
            attempt = self._attempt(self._batch.calls[micro_batch], factor)
        except Exception:  # noqa: BLE001 - the model's own code; training goes on
            _log.exception("hallo_numguard could not run the batch again")
        return self._agree(attempt)

    def _attempt(self, call: ModelCall, factor: float | None) -> Attempt:
        return rerun(self._module, self._forward_of(call), call.outputs or (), call.seeds, factor)

    def _forward_of(self, call: ModelCall) -> Callable[[], Any]:
        def forward() -> Any:
            call.random.restore()
            with call.autocast.restored():
                return self._forward(call.args, call.kwargs)

        return forward

    def _agree(self, attempt: Attempt | None) -> _Answer:
        ranks, device = self._ranks, self._device
        done = ranks.lowest(int(attempt is not None), device) == 1
        differs = attempt is not None and not attempt.same
        bad = attempt is not None and attempt.origin is not None
        absmax = attempt.gradient_absmax if attempt is not None else 0.0
        room = math.floor(math.log2(LARGEST_HALF / absmax)) if absmax > 0 else _NONE
        return _Answer(
            done,
            ranks.total(int(differs), device),
            ranks.lowest(ranks.rank if differs else _NONE, device),
            ranks.total(int(bad), device),
            ranks.first_text(_origin_as_text(attempt, ranks.rank) if bad else None, device),
            ranks.lowest(room, device),
        )

    def _replayed(self, answer: _Answer, micro_batch: int) -> Replayed:
        found = Replayed(
            answer.failure_reason,
            micro_batch,
            bad_ranks=answer.bad_ranks,
            differing_ranks=answer.differing_ranks,
            differing_rank=answer.differing_rank,
        )
        if answer.origin_text is None:
            return found
        origin, details, number = json.loads(answer.origin_text)
        return replace(found, origin=decode(Offender, origin), details=tuple(details), number=number)


def _is_complete(call: ModelCall) -> bool:
    return call.outputs is not None and not call.changed


def _origin_as_text(attempt: Attempt | None, rank: int) -> str | None:
    if attempt is None or attempt.origin is None:
        return None
    origin = attempt.origin
    parts = [asdict(_offender(origin, rank)), _details(origin, attempt.input_absmax), origin.call]
    return json.dumps(parts, ensure_ascii=False)


def _offender(origin: Origin, rank: int) -> Offender:
    tensor = origin.tensor
    is_weight = origin.kind == "gradient" and not tensor.name.startswith(("input", "output"))
    name = f"{origin.name}.{tensor.name}".lstrip(".") if is_weight else origin.name
    return Offender(
        kind=origin.kind,
        name=clip(name, MAX_NAME_BYTES),
        module=clip(origin.name, MAX_NAME_BYTES),
        rank=rank,
        index=origin.index,
        nan=tensor.record.nan,
        pos_inf=tensor.record.pos_inf,
        neg_inf=tensor.record.neg_inf,
        absmax=tensor.record.absmax,
        numel=math.prod(tensor.shape),
        shape=tensor.shape,
        dtype=tensor.dtype,
    )


def _details(origin: Origin, input_absmax: float) -> list[str]:
    details = [f"the first module that turned finite into non-finite is {origin}"]
    if origin.kind == "activation" and input_absmax:
        details.append(f"the largest number that it was given is {input_absmax:.4g}")
    if origin.neighbours:
        values = ", ".join(f"{value:.4g}" for value in origin.neighbours)
        details.append(f"around that element: {values}")
    return [clip(detail, MAX_LINE_BYTES) for detail in details]
