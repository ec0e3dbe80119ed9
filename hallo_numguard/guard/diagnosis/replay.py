"""Replay of a bad batch by all ranks together: which module went wrong, and whether a lower loss scale would help."""

from __future__ import annotations

import contextlib
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
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.collectives import Ranks, clip
from hallo_numguard.guard.containment import contain_failures
from hallo_numguard.guard.diagnosis.evidence import Evidence, Replayed
from hallo_numguard.guard.diagnosis.rules import needs_replay, needs_replay_of_step
from hallo_numguard.guard.diagnosis.texts import MAX_LINE_BYTES, MAX_NAME_BYTES, source_as_text
from hallo_numguard.guard.guarded_model import Forward, GuardedModel
from hallo_numguard.guard.stages import Figures
from hallo_numguard.guard.step.batch import Batch
from hallo_numguard.guard.step.local_gradients import LocalGradients
from hallo_numguard.guard.step.model_call import ModelCall
from hallo_numguard.guard.step.step_call import StepCall
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.tracing.capture import Captured, NotCaptured, capture
from hallo_numguard.tracing.rerun import Attempt, Match, Peers, rerun, rerun_compiled
from hallo_numguard.tracing.watch import unwatched

_log = logging.getLogger("hallo_numguard")

LARGEST_HALF = float(torch.finfo(torch.float16).max)
MAX_FURTHER_HALVINGS = 3  # below the scale that should be low enough
_NONE = 1 << 20

NOT_THE_SAME = (
    "run again, the model returned something else: it draws random numbers, or keeps state, that the guard cannot put "
    "back"
)
NOT_THE_SAME_BEFORE = "run again in an earlier step, the model returned something else, so it is not run again any more"
OTHER_NUMBERS = (
    "run again eagerly it was finite, with other random numbers than those that the compiled model has drawn"
)
MORE_THAN_KEPT = "the step had more micro-batches than are kept, and one of the others had a loss that is not finite"
FINITE_WHERE_KEPT = (
    "the micro-batches that are kept were finite when they were run again; those before them are not kept"
)
NOT_TRIED_BEFORE = (
    "a stage of the pipeline sent back a gradient that is not finite, so that the stages before it cannot be tried; "
    "that stage, run again at a lower loss scale, is finite"
)
NOT_SENT_AGAIN = "a stage of the pipeline sent back a gradient that is not finite, and run again it is finite"
OTHER_PART = (
    "the loss was made of several outputs of which one was made of another, whose gradient was not finite: what it had "
    "from the loss alone is not known"
)
NO_SEEDS = "no gradient has reached what the model returned: the loss was made of something else"


@dataclass(frozen=True)
class _Answer:
    """Result of one pass, the same on every rank."""

    match: Match
    differing_ranks: int
    differing_rank: int
    bad_ranks: int
    origin_text: str | None
    source_text: str | None
    absmax_power: int  # minimum over the ranks: gradients fit if multiplied by 2 to this power
    gradient_sum: float  # over the ranks, of their largest gradient: no element of the reduction is larger
    as_recorded: bool  # gradients of all ranks that are not bad are those that were recorded before the reduction

    @property
    def failure_reason(self) -> str:
        if self.match is Match.FAILED:
            return "the batch could not be run again (its own error is in the log)"
        return NOT_THE_SAME if self.match is Match.DIFFERENT else ""


class _Peers(Peers):
    def __init__(self, ranks: Ranks, device: torch.device, where: str) -> None:
        self._ranks = ranks
        self._device = device
        self._where = where

    def agree(self, match: Match) -> Match:
        return Match(self._ranks.highest(match, self._device))

    def have_the_same(self, number: int) -> bool:
        return self._ranks.highest(number, self._device) == self._ranks.lowest(number, self._device)

    def collectives(self) -> contextlib.AbstractContextManager[Any]:
        return self._ranks.collectives_met(self._where)

    def failed(self) -> None:
        self._ranks.fail(self._where)


class Replayer:
    """Runs passes of the pending step again.

    All ranks must call each method in the same step: they reduce, and under ZeRO stage 3 the model's forward gathers
    its weights.

    Args:
        model: The guarded model.
        module: Its module.
        forward: Calls the module as the framework does.
        batch: Calls of the pending step.
        ranks: Ranks among which gradients are reduced.
        local_gradients: Scans of gradients before the reduction.
    """

    def __init__(
        self,
        model: GuardedModel,
        module: nn.Module,
        forward: Forward,
        batch: Batch,
        ranks: Ranks,
        local_gradients: LocalGradients,
    ) -> None:
        self._model = model
        self._module = module
        self._forward = forward
        self._batch = batch
        self._ranks = ranks
        self._device = model.device
        self._local_gradients = local_gradients
        self._is_unrepeatable = False
        self._is_step_unrepeatable = False
        self._runs = 0

    def explain(self, evidence: Evidence, losses: Sequence[torch.Tensor]) -> Replayed | None:
        """Reruns the step of an overflow where that adds evidence. All ranks call it with the same evidence.

        Args:
            evidence: What is known without it.
            losses: Losses of this rank's micro-batches.

        Returns:
            What the model's calls have shown, or the whole step if that shows more; None if nothing is to be gained.
        """
        if not needs_replay(evidence):
            return None
        with self._local_gradients.muted():
            if not evidence.loss_known:
                found = Replayed(self._reason_without_losses())
            elif evidence.loss is not None:
                found = self._rerun_bad_loss([bool(torch.isfinite(loss)) for loss in losses])
            else:
                found = self._rerun_bad_gradients(evidence.scaling.scale)
                if evidence.not_kept and needs_replay_of_step(found) and not found.failure_reason:
                    found = Replayed(FINITE_WHERE_KEPT)
            return self._explained(found)

    def explain_bad_loss(self, losses: Sequence[bool]) -> Replayed:
        """Reruns a step with a loss that is not finite, though its gradients are. All ranks call it.

        Args:
            losses: Whether the loss of each micro-batch on this rank was finite.
        """
        with self._local_gradients.muted():
            return self._explained(self._rerun_bad_loss(losses))

    def _explained(self, found: Replayed) -> Replayed:
        """What the model's calls have shown, or the whole step, which is run again where they explain nothing."""
        step = self._rerun_step() if needs_replay_of_step(found) else None
        found = found if step is None or step.source is None else step
        return replace(found, origin=found.origin and self._model.with_first_name(found.origin))

    def _rerun_bad_loss(self, losses: Sequence[bool]) -> Replayed:
        """Reruns the first micro-batch whose loss was not finite; all calls, where one loss comes from several.

        Args:
            losses: Whether the loss of each micro-batch on this rank was finite.
        """
        calls = self._ranks.lowest(len(self._batch.calls), self._device)
        before = self._batch.losses_before(len(losses))
        a_call_a_loss = self._ranks.lowest(int(before is not None), self._device) == 1
        if self._model.stage is not None and not a_call_a_loss:
            return Replayed(MORE_THAN_KEPT)
        first = next((position for position, finite in enumerate(losses) if not finite), _NONE)
        micro_batch = self._ranks.lowest(first - (before or 0), self._device)
        if a_call_a_loss and micro_batch < 0:
            return Replayed(MORE_THAN_KEPT)
        suspects = [micro_batch] if a_call_a_loss else range(calls)
        failure_reason = self._reason_not_to_run(suspects[-1] + 1 if suspects else 0)
        if failure_reason:
            return Replayed(failure_reason)
        found = Replayed()
        for position in suspects:
            answer, attempt = self._run(position, None, watches=True)
            found = self._replayed(answer, position)
            if answer.match is Match.DIFFERENT and self._is_compiled and self._repeats_compiled(position):
                return Replayed(micro_batch=position, only_compiled=True)
            if self._is_one_rank_different(answer):
                return replace(found, is_one_ranks_fault=self._comes_out_the_same(position, None, attempt))
            if found.failure_reason or found.origin is not None:
                break
        return found

    def _rerun_bad_gradients(self, scale: float) -> Replayed:
        """Reruns the step's micro-batches until one has gradients that are not finite, then searches for a loss scale.

        Args:
            scale: The loss scale.
        """
        count = self._ranks.lowest(len(self._batch.calls), self._device)
        failure_reason = self._reason_not_to_run(count)
        if failure_reason:
            return Replayed(failure_reason)
        seeds = [seed for call in list(self._batch.calls)[:count] for seed in call.seeds.values()]
        if self._ranks.lowest(len(seeds), self._device) == 0:
            return Replayed(NO_SEEDS)
        if self._model.stage is not None:
            given_bad = self._first_given_bad(count)
            if given_bad < count:
                return self._replayed(self._run(given_bad, None, watches=True)[0], given_bad)
        has_dropped = self._model.stage is not None and self._drop_bad_seeds(count)
        seeds = [seed for call in list(self._batch.calls)[:count] for seed in call.seeds.values()]
        if self._ranks.highest(int(multi_tensor_stats(seeds).found_inf()), self._device):
            inner = self._run_for_inner_outputs(count)
            if isinstance(inner, Replayed):
                return inner
            calls = list(self._batch.calls)[:count]
            seeds = [seed for at, call in enumerate(calls) for key, seed in call.seeds.items() if key not in inner[at]]
            if self._ranks.highest(int(multi_tensor_stats(seeds).found_inf()), self._device):
                return Replayed(
                    "the gradient that reached the model's output was not finite already", came_from_the_loss=True
                )
        attempts = []
        are_as_recorded, gradient_sum, rank_sum = True, 0.0, 0.0
        for micro_batch in range(count):
            answer, attempt = self._run(micro_batch, 1.0)
            attempts.append(attempt)
            rank_sum += _largest_gradient(attempt)
            found = self._replayed(answer, micro_batch)
            if answer.failure_reason:
                return found
            if answer.match is Match.ALIKE and not answer.bad_ranks:
                return Replayed(OTHER_NUMBERS)
            if answer.bad_ranks:
                if self._ranks.highest(int(attempt.is_partial), self._device):
                    return Replayed(OTHER_PART)
                found = self._at_lower_scales(found, scale) if scale > 1 else found
                if has_dropped and found.finite_unscaled:
                    return Replayed(NOT_TRIED_BEFORE)
                return found if found.finite_unscaled else self._watched(found, scale)
            gradient_sum += answer.gradient_sum
            are_as_recorded = are_as_recorded and answer.as_recorded and answer.match is Match.SAME
        if has_dropped:
            return Replayed(NOT_SENT_AGAIN)
        is_certain = are_as_recorded and all(
            self._comes_out_the_same(micro_batch, 1.0, before) for micro_batch, before in enumerate(attempts)
        )
        rank_sum = float(self._ranks.any(torch.tensor(rank_sum, dtype=torch.float64, device=self._device)))
        return Replayed("", count - 1, is_one_ranks_fault=is_certain, gradient_sum=gradient_sum, rank_sum=rank_sum)

    def _run_for_inner_outputs(self, count: int) -> list[frozenset[int]] | Replayed:
        """Runs calls again for which of their outputs others were made of; why not, if that cannot be."""
        calls = list(self._batch.calls)[:count]
        inner: list[frozenset[int]] = [frozenset()] * count
        if self._ranks.highest(int(any(len(call.seeds) > 1 for call in calls)), self._device):
            for micro_batch in range(count):
                answer, attempt = self._run(micro_batch, None)
                if answer.failure_reason:
                    return self._replayed(answer, micro_batch)
                inner[micro_batch] = attempt.inner
        return inner

    def _first_given_bad(self, count: int) -> int:
        """First micro-batch of which a stage was given NaN or Inf, the same on all ranks; above `count` if none was."""
        given = (at for at in range(count) if self._was_given_bad(self._batch.calls[at]))
        return self._ranks.lowest(next(given, _NONE), self._device)

    def _was_given_bad(self, call: ModelCall) -> bool:
        stage = self._model.stage
        return stage is not None and Figures.of(stage.received(call.contents.tensors)).nonfinite > 0

    def _drop_bad_seeds(self, count: int) -> bool:
        """Drops gradients that the next stage has sent and that are not finite: their cause lies there.

        Returns:
            Whether any rank has dropped some, the same on all ranks.
        """
        stage, calls = self._model.stage, list(self._batch.calls)[:count]
        bad = [call for call in calls if call.seeds and bool(multi_tensor_stats(list(call.seeds.values())).found_inf())]
        bad = [] if stage is None or stage.is_last else bad
        for call in bad:
            call.seeds.clear()
        return self._ranks.highest(int(bool(bad)), self._device) == 1

    def _rerun_step(self) -> Replayed | None:
        """Reruns the step's calls of the function that makes the loss, until one is not finite. All ranks call it.

        Returns:
            The result; None if there is no such function, or what it returns was not the same when it was run again.
        """
        count = self._ranks.lowest(len(self._batch.step_calls), self._device)
        reason = self._reason_not_to_run_step(count)
        if count == 0 or reason:
            return Replayed(reason, is_whole_step=True) if reason else None
        found = Replayed(is_whole_step=True)
        for position in range(count):
            answer = self._run_step(self._batch.step_calls[position], position)
            found = replace(
                self._replayed(answer, position), is_whole_step=True, finite_unscaled=not answer.source_text
            )
            if answer.failure_reason or answer.source_text:
                break
        return found

    def _reason_not_to_run_step(self, count: int) -> str:
        calls = list(self._batch.step_calls)[:count]
        reasons = [call.reason_not_to_repeat for call in calls if call.reason_not_to_repeat]
        if self._is_step_unrepeatable:  # the same on all ranks
            reasons = [NOT_THE_SAME_BEFORE]
        if self._ranks.alone_because:
            reasons = ["the other ranks do not take part"]
        return self._ranks.first_text(reasons[0] if reasons else None, self._device) or ""

    def _run_step(self, call: StepCall, position: int) -> _Answer:
        first_call = call.first_call - self._batch.calls_before
        first = self._batch.calls[first_call] if 0 <= first_call < len(self._batch.calls) else None

        def repeat() -> Any:
            with unwatched():
                if first is not None:
                    first.state.restore()
                call.random.restore()
            with call.autocast.restored(), self._model.called_directly():
                return call.repeat()

        recorded = [] if call.loss is None else [call.loss]
        seeds = {at: torch.ones_like(loss) for at, loss in enumerate(recorded)}
        attempt = rerun(
            self._module,
            repeat,
            recorded,
            seeds,
            1.0,
            call.contents,
            self._next_peers(),
            watches=True,
            of_leaves=self._model.gathers_parameters,
        )
        if first is not None and self._was_given_bad(first):
            attempt = replace(attempt, origin=None, source=None)
        answer = self._agree(attempt, position, 1.0)
        self._recover_everywhere(answer.match is Match.FAILED)
        self._is_step_unrepeatable = answer.match is Match.DIFFERENT
        return answer

    def _reason_without_losses(self) -> str:
        """Why the step's passes are not run again where a loss is unknown: the same on all ranks."""
        count = self._ranks.lowest(len(self._batch.calls), self._device)
        return self._reason_not_to_run(count) or "nothing shows whether the loss was finite"

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
        captured: Captured | str
        peers, failed = self._next_peers(), False
        try:
            with self._local_gradients.muted(), peers.collectives():
                captured = capture(self._module, name, number, self._forward_of(call), call.seeds, call.contents)
        except NotCaptured as error:
            captured = str(error)
        except Exception as error:  # noqa: BLE001 - the model's own code; training goes on
            peers.failed()
            captured, failed = f"the batch could not be run again: {error}", True
        self._recover_everywhere(self._ranks.highest(int(failed), self._device) == 1)
        return captured

    def _recover_everywhere(self, has_failed: bool) -> None:
        """Puts the framework's own state in order after a pass, on all ranks alike."""
        with contain_failures("run of the batch again", "the framework's own state may be left in the middle of it"):
            self._model.recover(has_failed)

    def _next_peers(self) -> _Peers:
        """The other ranks in one more run; all ranks make the same runs."""
        self._runs += 1
        return _Peers(self._ranks, self._device, f"run {self._runs}")

    def _is_one_rank_different(self, answer: _Answer) -> bool:
        """Whether one of several ranks returned something else, all finite, and the others the same bits."""
        is_alone = self._ranks.size > 1 and answer.match is Match.DIFFERENT and answer.differing_ranks == 1
        return is_alone and answer.bad_ranks == 0

    def _comes_out_the_same(self, micro_batch: int, factor: float | None, before: Attempt) -> bool:
        """Whether every rank, run once more, gives the same bits as in the rerun before. All ranks call it."""
        if self._ranks.size == 1:
            return False
        _, attempt = self._run(micro_batch, factor)
        return self._ranks.lowest(int(attempt.fingerprint == before.fingerprint), self._device) == 1

    def _watched(self, found: Replayed, scale: float) -> Replayed:
        """Runs the micro-batch once more without loss scaling, and watches every operation."""
        answer, _ = self._run(found.micro_batch, min(1.0, 1.0 / scale), watches=True)
        return replace(found, source=self._replayed(answer, found.micro_batch).source)

    def _at_lower_scales(self, found: Replayed, scale: float) -> Replayed:
        unscaled, _ = self._run(found.micro_batch, 1.0 / scale)
        if unscaled.failure_reason:
            return found
        if unscaled.bad_ranks:
            return replace(self._replayed(unscaled, found.micro_batch), finite_unscaled=False)
        expected_power = min(unscaled.absmax_power, round(math.log2(scale)) - 1)
        for power in range(expected_power, max(expected_power - MAX_FURTHER_HALVINGS, 0), -1):
            answer, _ = self._run(found.micro_batch, 2.0**power / scale)
            if not answer.bad_ranks and not answer.failure_reason:
                return replace(found, finite_unscaled=True, settles_at=2.0**power)
        return replace(found, finite_unscaled=True, settles_at=1.0)

    def _reason_not_to_run(self, count: int) -> str:
        """Why these passes cannot be repeated, agreed by all ranks; "" if they can."""
        if self._is_unrepeatable:  # the same on all ranks
            return NOT_THE_SAME_BEFORE
        if self._ranks.alone_because:
            return "the other ranks do not take part, and the model may have collectives of its own"
        calls = list(self._batch.calls)[:count]
        reasons = [call.reason_not_to_repeat for call in calls if call.reason_not_to_repeat]
        reason = reasons[0] if reasons else ("" if 0 < count == len(calls) else "the batch was not seen")
        return self._ranks.first_text(reason or None, self._device) or ""

    def _run(self, micro_batch: int, factor: float | None, watches: bool = False) -> tuple[_Answer, Attempt]:
        call = self._batch.calls[micro_batch]
        attempt = rerun(
            self._module,
            self._forward_of(call),
            call.outputs or (),
            call.seeds,
            factor,
            call.contents,
            self._next_peers(),
            watches,
            self._is_compiled,
            self._model.gathers_parameters,
            of_arguments=self._model.stage is not None,
        )
        if self._was_given_bad(call):  # by the stage before, where the cause lies
            attempt = replace(attempt, origin=None, source=None)
        answer = self._agree(attempt, micro_batch, factor)
        self._recover_everywhere(answer.match is Match.FAILED)
        if answer.match is Match.DIFFERENT and not self._is_one_rank_different(answer):
            self._is_unrepeatable = True
            _log.info("a bad batch will not be run again: %s", NOT_THE_SAME)
        return answer, attempt

    @property
    def _is_compiled(self) -> bool:
        return self._model.forward_compiled is not None and self._model.is_compiled()

    def _repeats_compiled(self, micro_batch: int) -> bool:
        """Whether a micro-batch, run again as compiled as it was, gives on every rank what it gave."""
        call, compiled = self._batch.calls[micro_batch], self._model.forward_compiled
        forward = self._forward_of(call, compiled)
        match = rerun_compiled(self._module, forward, call.outputs or (), call.contents, self._next_peers())
        self._recover_everywhere(match is Match.FAILED)
        return match <= Match.CLOSE

    def _forward_of(self, call: ModelCall, forward: Forward | None = None) -> Callable[[], Any]:
        def repeat() -> Any:
            with unwatched():
                call.state.restore()
                call.random.restore()
            with call.autocast.restored():
                return (forward or self._forward)(call.args, call.kwargs)

        return repeat

    def _agree(self, attempt: Attempt, micro_batch: int, factor: float | None) -> _Answer:
        ranks, device = self._ranks, self._device
        differs = attempt.match is Match.DIFFERENT
        bad = attempt.origin is not None
        absmax = attempt.gradient_absmax
        room = math.floor(math.log2(LARGEST_HALF / absmax)) if absmax > 0 else _NONE
        as_recorded = factor == 1.0 and self._local_gradients.agree_with(attempt.parameter_absmax, micro_batch)
        return _Answer(
            Match(ranks.highest(attempt.match, device)),
            ranks.total(int(differs), device),
            ranks.lowest(ranks.rank if differs else _NONE, device),
            ranks.total(int(bad), device),
            ranks.first_text(self._origin_as_text(attempt) if bad else None, device, attempt.origin_order),
            self._source_as_text(attempt),
            ranks.lowest(room, device),
            float(ranks.sum(torch.tensor(_largest_gradient(attempt), dtype=torch.float64, device=device))),
            ranks.lowest(int(as_recorded), device) == 1,
        )

    def _source_as_text(self, attempt: Attempt) -> str | None:
        """The earliest source of all ranks; where that has come by a collective, the source of what was sent before."""
        text, sent = self._first_source(attempt.source), attempt.sent
        first = None if text is None else decode(Source, json.loads(text))
        if first is None or not first.is_received:
            return text
        return self._first_source(sent if sent is not None and sent.collectives < first.collectives else None) or text

    def _first_source(self, source: Source | None) -> str | None:
        text = source_as_text(source, self._ranks.rank, self._model.in_global_names)
        return self._ranks.first_text(text, self._device, 0 if source is None else source.collectives)

    def _origin_as_text(self, attempt: Attempt) -> str | None:
        origin = attempt.origin
        if origin is None:
            return None
        parts = [asdict(_offender(origin, self._ranks.rank)), _details(origin, attempt.input_absmax), origin.call]
        return self._model.in_global_names(json.dumps(parts, ensure_ascii=False))

    def _replayed(self, answer: _Answer, micro_batch: int) -> Replayed:
        found = Replayed(
            answer.failure_reason,
            micro_batch,
            bad_ranks=answer.bad_ranks,
            differing_rank=answer.differing_rank,
            is_close=answer.match is Match.CLOSE,
        )
        if answer.source_text is not None:
            found = replace(found, source=decode(Source, json.loads(answer.source_text)))
        if answer.origin_text is None:
            return found
        origin, details, number = json.loads(answer.origin_text)
        return replace(found, origin=decode(Offender, origin), details=tuple(details), number=number)


def _largest_gradient(attempt: Attempt) -> float:
    return max(attempt.parameter_absmax.values(), default=0.0)


def _offender(origin: Origin, rank: int) -> Offender:
    tensor = origin.tensor
    is_weight = origin.kind == "gradient" and not tensor.name.startswith(("input", "output"))
    name = f"{origin.name}.{tensor.name}".lstrip(".") if is_weight else origin.name or tensor.name
    name, module = clip(name, MAX_NAME_BYTES), clip(origin.name, MAX_NAME_BYTES)
    return replace(tensor.offender(origin.kind, name, module, rank), index=origin.index)


def _details(origin: Origin, input_absmax: float) -> list[str]:
    details = [f"the first module that turned finite into non-finite is {origin}"]
    if origin.kind == "activation" and input_absmax:
        details.append(f"the largest number that it was given is {input_absmax:.4g}")
    if origin.neighbours:
        values = ", ".join(f"{value:.4g}" for value in origin.neighbours)
        details.append(f"around that element: {values}")
    return [clip(detail, MAX_LINE_BYTES) for detail in details]
