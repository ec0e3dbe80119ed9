"""Pipeline parallelism: which layers each rank holds, and the schedule that calls them.

DeepSpeed names a layer by its number in the whole `PipelineModule`, so that names mean the same on all ranks. The
guard's list has the tensors of all stages, in the same order on every rank; those of other stages are empty here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hallo_numguard.core.errors import InvalidInput, UnsupportedDeepSpeed
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.collectives import Place, Ranks
from hallo_numguard.guard.named_tensors import NamedTensor, named_buffers
from hallo_numguard.guard.session import Session
from hallo_numguard.guard.stages import Stage
from hallo_numguard.integrations.deepspeed.adapters import adapter_class
from hallo_numguard.integrations.deepspeed.engine import call_module, parameters_of
from hallo_numguard.integrations.deepspeed.parallel import PartFigures
from hallo_numguard.integrations.deepspeed.unsupported import check_supported

_RECEIVED = "forward_input"  # argument of PipelineModule.forward
_LABELS = "labels"
_MAX_NUMBERS = 8
_TIED = "tied_modules."  # DeepSpeed adds up the gradients of these over the stages


@dataclass(frozen=True)
class _Described:
    """A tensor of a stage, as that stage describes it to the others."""

    kind: str
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stages: tuple[int, ...]


@dataclass(frozen=True)
class _Rank:
    """What a rank tells the others when a guard is attached."""

    refusal: str
    stage: int
    tensors: tuple[_Described, ...]
    layers: Mapping[int, str]


class Pipeline:
    """The stages of an engine's pipeline, agreed by all ranks. All of them make one when a guard is attached.

    Args:
        engine: A `deepspeed.PipelineEngine`.
        ranks: All ranks of the job.

    Attributes:
        stage: This rank's stage.

    Raises:
        UnsupportedDeepSpeed: On all ranks, if one of them refuses.
        InvalidInput: If a guard is not attached on all ranks.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        grid, place = engine.grid, ranks.place or Place(0, 0, 1)
        stages, group = int(grid.get_pipe_parallel_world_size()), grid.get_pipe_parallel_group()
        self.stage = Stage(place.shard, stages, place.copy, place.copies, group, _RECEIVED)
        self._topology = grid.topology()
        mine = _told_by(engine, self.stage.number)
        found = _of_all(ranks, mine)
        refusals = [f"{item.refusal} (so says rank {rank})" for rank, item in enumerate(found) if item.refusal]
        if refusals:
            raise UnsupportedDeepSpeed(mine.refusal or refusals[0])
        self._replicated = any(getattr(item, "ds_pipe_replicated", False) for item in engine.module.parameters())
        self._layers = {number: (name, item.stage) for item in found for number, name in item.layers.items()}
        self._listed = _in_order(found)
        self._stages_of = {item.name: item.stages for item in self._listed}

    def listed(self, kind: str, tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
        """Returns this stage's tensors of a kind with those of all stages, in the same order on all ranks."""
        mine = {_key(item): item for item in tensors}
        return [self._as_listed(item, mine.get(_key(item))) for item in self._listed if item.kind == kind]

    def _as_listed(self, item: _Described, mine: NamedTensor | None) -> NamedTensor:
        is_everywhere = len(item.stages) == self.stage.stages and item.name.startswith(_TIED)
        if mine is not None:
            return replace(mine, aliases=item.aliases, is_everywhere=is_everywhere)
        empty = torch.empty(0, dtype=item.dtype)
        return NamedTensor(item.kind, item.name, empty, item.aliases, item.shape, is_everywhere=False)

    def figures(self, parameters: Sequence[NamedTensor], is_sliced: bool) -> PartFigures:
        """Returns how this rank's share of the figures is made: tied layers count on their first stage alone.

        Args:
            parameters: The guard's list.
            is_sliced: Whether ranks hold slices of the gradients; else copies.
        """
        is_first = is_sliced or self.stage.copy == 0

        def counts_here(item: NamedTensor) -> bool:
            return is_first and (not item.name.startswith(_TIED) or self._is_first_of(item.name))

        return PartFigures(parameters, counts_here)

    def _is_first_of(self, name: str) -> bool:
        return self._stages_of[name][0] == self.stage.number

    def reason_to_observe(self) -> str | None:
        """Returns why no pass of DeepSpeed can be replaced on this rank; None if they can."""
        return "tied layers are held by several stages, and count once in the norm" if self._replicated else None

    def remarks(self, report: OverflowReport) -> list[str]:
        """Returns where in the pipeline the first offender of a report stands: the same on all ranks."""
        return [] if report.first is None else self._where(report.first)

    def _where(self, first: Offender) -> list[str]:
        number = first.name.partition(".")[0]
        layer = self._layers.get(int(number)) if number.isdecimal() else None
        stages: Sequence[int] = self._stages_of.get(first.name, ()) if layer is None else [layer[1]]
        if stages:
            what = first.name if layer is None else f"layer {number} ({layer[0]})"
            ranks = sorted(rank for stage in stages for rank in self._topology.filter_match(pipe=stage))
            return [f"{what}: {self._named(stages)}, on {_in_words('rank', ranks)}"]
        if first.rank is None:
            return []
        return [f"rank {first.rank}: {self._named([int(self._topology.get_coord(first.rank).pipe)])}"]

    def _named(self, stages: Sequence[int]) -> str:
        return f"{_in_words('stage', stages)} of {self.stage.stages}, counted from 0"


def _in_words(noun: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    few = numbers if len(numbers) <= _MAX_NUMBERS else [*numbers[: _MAX_NUMBERS - 1], "..."]
    return f"{noun}s {', '.join(map(str, few[:-1]))} and {numbers[-1]}"


def _key(item: NamedTensor | _Described) -> tuple[str, str, tuple[int, ...]]:
    shape = item.shape if isinstance(item, _Described) else item.whole_shape
    return item.kind, item.name, shape or ()


def stage_parameters(engine: Any) -> list[NamedTensor]:
    """Returns the parameters of this rank's stage."""
    groups = adapter_class(engine.optimizer).parameter_groups(engine.optimizer)
    return parameters_of(engine.module, groups)


def _told_by(engine: Any, stage: int) -> _Rank:
    """What this rank tells: whatever speaks against the engine keeps no other rank waiting."""
    try:
        check_supported(engine)
        tensors = [*stage_parameters(engine), *named_buffers(engine.module)]
    except UnsupportedDeepSpeed as error:
        return _Rank(str(error), stage, (), {})
    described = (
        _Described(item.kind, item.name, item.aliases, item.whole_shape, item.tensor.dtype, (stage,))
        for item in tensors
    )
    return _Rank("", stage, tuple(described), _layers_of(engine.module))


def _layers_of(module: Any) -> Mapping[int, str]:
    """Classes of a stage's layers by their number in the whole model; functions have none."""
    functions: Sequence[Any] = module.forward_funcs
    return {
        module._local_start + place: type(layer).__name__
        for place, layer in enumerate(functions)
        if isinstance(layer, torch.nn.Module)
    }


def _of_all(ranks: Ranks, mine: _Rank) -> list[_Rank]:
    """What all ranks tell, by rank."""
    if ranks.size == 1:
        return [mine]
    with ranks.assembled("pipeline"):
        if ranks.alone_because:
            raise InvalidInput("a pipeline is guarded on all of its ranks: not every rank has called attach")
        return ranks.gathered(mine)


def _in_order(found: Sequence[_Rank]) -> list[_Described]:
    """The tensors of all stages in the order of the stages; what several stages hold once."""
    by_stage = {item.stage: item.tensors for item in reversed(found)}
    listed: dict[Any, _Described] = {}
    for stage in sorted(by_stage):
        for item in by_stage[stage]:
            before = listed.get(_key(item))
            if before is None:
                listed[_key(item)] = item
                continue
            both = replace(before, stages=(*before.stages, stage))
            if not item.name.startswith(_TIED):  # as the loss function, which comes after all layers
                del listed[_key(item)]
            listed[_key(item)] = both
    return list(listed.values())


def call_stage(engine: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls this rank's layers once more, with what the stage before had sent."""
    del kwargs  # the labels
    return call_module(engine, args, {})


class ScheduleHooks:
    """Shows a session what the schedule of a pipeline does: calls of the layers, losses.

    DeepSpeed looks the method of an instruction up in a table of the class, which gets a copy on the instance.

    Args:
        engine: The engine.
        session: Session of this rank.
        on_loss: Takes the loss of each micro-batch before its backward pass.
    """

    def __init__(self, engine: Any, session: Session, on_loss: Callable[[Any], None]) -> None:
        self._engine = engine
        self._session = session
        self._on_loss = on_loss
        self._is_on = False
        self._before: Mapping[type, Callable[..., Any]] | None = None
        replacements: dict[str, Callable[..., None]] = {
            "ForwardPass": self._forward,
            "BackwardPass": self._backward,
            "OptimizerStep": self._step,
        }
        self._table: Mapping[type, Callable[..., Any]] = {
            kind: functools.partial(_run, replacements[kind.__name__], method)
            if kind.__name__ in replacements
            else method
            for kind, method in engine._INSTRUCTION_MAP.items()
        }

    def start(self) -> None:
        """Puts the hooks on."""
        self._is_on = True
        self._before = vars(self._engine).get("_INSTRUCTION_MAP")
        self._engine._INSTRUCTION_MAP = self._table

    def stop(self) -> None:
        """Takes the hooks off; where other code has wrapped them, they pass calls on."""
        self._is_on = False
        if vars(self._engine).get("_INSTRUCTION_MAP") is not self._table:
            return
        if self._before is None:
            del self._engine._INSTRUCTION_MAP
        else:
            self._engine._INSTRUCTION_MAP = self._before

    def _forward(self, method: Callable[..., Any], engine: Any, buffer_id: int) -> None:
        is_training = self._is_on and torch.is_grad_enabled()  # else it is eval_batch
        given = self._session.probes.run("record of the batch", _given, engine, buffer_id) if is_training else None
        if given is None:
            method(engine, buffer_id=buffer_id)
            return
        self._session.on_forward_start(*given)
        call = self._session.on_step_start(functools.partial(_loss_of, engine), *given)
        method(engine, buffer_id=buffer_id)
        self._session.on_forward_end(engine.pipe_buffers["outputs"][buffer_id])
        self._session.on_step_end(call, engine.loss if engine.is_last_stage() else _NO_LOSS)

    def _backward(self, method: Callable[..., Any], engine: Any, buffer_id: int) -> None:
        if self._is_on and engine.is_last_stage():
            self._on_loss(engine.loss)
        method(engine, buffer_id=buffer_id)

    def _step(self, method: Callable[..., Any], engine: Any, **kwargs: Any) -> None:
        try:
            method(engine, **kwargs)
        except BaseException:
            if self._is_on:
                _end_step(engine)
            raise


def _end_step(engine: Any) -> None:
    """Ends what a step that raises leaves open: the next one would begin as if at its end, and with running timers."""
    engine._force_grad_boundary = False
    timers: Mapping[str, Any] = getattr(engine.timers, "timers", {})
    for timer in timers.values():
        if timer.started_:
            timer.stop(record=False)


_NO_LOSS = torch.zeros(())


def _run(replacement: Callable[..., None], method: Callable[..., Any], engine: Any, **kwargs: Any) -> None:
    replacement(method, engine, **kwargs)


def _given(engine: Any, buffer_id: int) -> tuple[tuple[Any], dict[str, Any]]:
    """What a stage is given: from the stage before, or of the batch, and the labels where the loss is made."""
    buffers: Mapping[str, Any] = engine.pipe_buffers
    labels = {_LABELS: buffers["labels"][buffer_id]} if engine.is_last_stage() else {}
    return (_alias(buffers["inputs"][buffer_id]),), labels


def _alias(value: Any) -> Any:
    """The same tensors without the gradients that they will get, which would be kept with them."""
    if isinstance(value, tuple):
        return tuple(map(_alias, value))
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _loss_of(engine: Any, forward_input: Any, labels: Any = None) -> Any:
    """The loss of a micro-batch on the last stage; a stand-in for it on the others, which take part in no loss."""
    if not engine.is_last_stage():
        return _NO_LOSS
    output = call_module(engine, (forward_input,), {})
    loss_function = engine.module.loss_fn
    return output if loss_function is None else loss_function(output, labels)
