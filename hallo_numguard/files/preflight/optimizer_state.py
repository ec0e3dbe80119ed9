"""The optimizer's state in a checkpoint: whether it is there, whole, possible, and that of the run to come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, load
from hallo_numguard.files.preflight.run_spec import Plan

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum")
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq")
_COMPARED = ("lr", "betas", "eps", "weight_decay", "momentum")
_REMEDY = "Go back to a checkpoint whose state is whole; else the first steps are made as if training began anew."
_NEGATIVE_REMEDY = "A mean of squares cannot be negative: the file is damaged. Go back to an earlier checkpoint."
_MOST = 10  # names in a sentence

State = dict[str, dict[str, list[TensorEntry]]]  # pieces, by parameter and role


def check(source: Source, plan: Plan) -> list[Finding]:
    """Returns what is wrong with the optimizer's state. That it is finite is for the scan of values to say.

    Cost: reads second moments and step counters, nothing else.
    """
    state = _state(source)
    findings = [*_presence(source, state), *_coverage(source, state), *_negatives(state)]
    return [*findings, *_steps(source, state), *_groups(source, plan)]


def _state(source: Source) -> State:
    state: State = {}
    for entry in source.entries:
        if entry.role in (*_MOMENTS, "fp32", "step"):
            state.setdefault(_owner(entry), {}).setdefault(entry.role, []).append(entry)
    return state


def _owner(entry: TensorEntry) -> str:
    """The parameter: in files of torch the name of a state ends in its own, as in optimizer.state.0.exp_avg."""
    head, _, last = entry.name.rpartition(".")
    return head if last == entry.role or last == "momentum_buffer" else entry.name


def _presence(source: Source, state: State) -> Iterator[Finding]:
    with_moments = {name for name, roles in state.items() if any(role in roles for role in _MOMENTS)}
    trained = {name for name, roles in state.items() if "fp32" in roles} or with_moments
    steps = source.metadata.get("global_steps", 0)
    if not with_moments:
        if steps or trained:
            yield _finding("no_optimizer_state", source, f"{source.root.name} holds no moments of an optimizer")
        return
    lacking = sorted(trained - with_moments)
    if lacking:
        what = f"{source.root.name} holds no moments of {_some(lacking)}, and of {len(with_moments)} other parameters"
        yield _finding("missing_state", source, what, name=lacking[0])
    for role in ("exp_avg", "exp_avg_sq"):
        others = {name for name in with_moments if "exp_avg" in state[name] or "exp_avg_sq" in state[name]}
        lacking = sorted(name for name in others if role not in state[name])
        if lacking:
            yield _finding("missing_state", source, f"{source.root.name} lacks {role} of {_some(lacking)}", lacking[0])


def _coverage(source: Source, state: State) -> Iterator[Finding]:
    """Whether the pieces of all ranks make up the whole tensor."""
    for name, roles in state.items():
        for role in (*_MOMENTS, "fp32"):
            pieces = roles.get(role, [])
            if not pieces or pieces[0].whole is None:
                continue
            wanted, held = math.prod(pieces[0].whole), sum({_place(piece): piece.numel for piece in pieces}.values())
            if held != wanted:
                message = f"{source.root.name} holds {held} of the {wanted} elements of {role} of {name}"
                yield _finding("incomplete_state", source, message, name)


def _place(piece: TensorEntry) -> tuple[int, ...]:
    return (piece.start,) if piece.corner is None else piece.corner


def _negatives(state: State) -> Iterator[Finding]:
    for name, roles in state.items():
        for entry in (piece for role in _NEVER_NEGATIVE for piece in roles.get(role, [])):
            try:
                values = load(entry).flatten()
            except (DamagedFile, OSError):
                continue  # which the scan of values says
            if values.numel() and values.min() < 0:
                lowest = int(values.argmin())
                index = ", ".join(map(str, entry.index_of(lowest)))
                yield Finding(
                    "negative_moment",
                    f"{entry.file.name}: {entry.role} of {name} is {float(values[lowest]):.4g} at [{index}], and "
                    f"{int((values < 0).sum())} values of it are negative",
                    name=name,
                    severity="error",
                    file=str(entry.file),
                    remedy=_NEGATIVE_REMEDY,
                )


def _steps(source: Source, state: State) -> Iterator[Finding]:
    """Step counters: one of every parameter or group, which have counted the same steps."""
    counted: dict[int, list[str]] = {}
    for name, roles in state.items():
        for entry in roles.get("step", []):
            counted.setdefault(_number(entry), []).append(name)
    for number, group in enumerate(source.metadata.get("param_groups") or ()):
        if type(group.get("step")) is int:
            counted.setdefault(group["step"], []).append(f"group {number}")
    if len(counted) > 1:
        told = "; ".join(f"{step}: {_some(names)}" for step, names in sorted(counted.items()))
        yield _finding("step_counters", source, f"{source.root.name}: parameters have counted other steps ({told})")
    taken = source.metadata.get("global_steps")
    if type(taken) is int and counted and max(counted) > taken + 1:  # stage 0 makes one with no gradients at first
        message = f"{source.root.name}: the optimizer has counted {max(counted)} steps, and the run {taken}"
        yield _finding("step_counters", source, message)
    if type(taken) is int and taken > source.metadata.get("skipped_steps", 0) and counted and max(counted) == 0:
        message = f"{source.root.name}: the optimizer has counted no step, and the run {taken}"
        yield _finding("step_counters", source, message)


def _number(entry: TensorEntry) -> int:
    try:
        return int(load(entry).flatten()[0])
    except (DamagedFile, OSError, IndexError, ValueError, OverflowError):
        return -1


def _groups(source: Source, plan: Plan) -> Iterator[Finding]:
    saved: Sequence[Mapping[str, Any]] = source.metadata.get("param_groups") or ()
    if not saved or not plan.param_groups:
        return
    if len(saved) != len(plan.param_groups):
        message = f"{source.root.name} has {len(saved)} parameter groups, and the optimizer {len(plan.param_groups)}"
        yield _finding("param_groups", source, message, remedy="Make the optimizer's groups as they were when saved.")
        return
    for number, (then, now) in enumerate(zip(saved, plan.param_groups, strict=True)):
        for key in _COMPARED:
            if key in then and key in now and not _same(then[key], now[key]):
                message = f"group {number}: {key} was {then[key]} when {source.root.name} was saved, and is {now[key]}"
                remedy = "load_checkpoint brings the saved one back: set it again afterwards if the new one is meant."
                yield Finding("param_groups", message, severity="info", file=str(source.root), remedy=remedy)


def _same(a: Any, b: Any) -> bool:
    listed = (list, tuple)
    return list(a) == list(b) if isinstance(a, listed) and isinstance(b, listed) else bool(a == b)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _finding(kind: str, source: Source, message: str, name: str = "", remedy: str = _REMEDY) -> Finding:
    return Finding(kind, message, name=name, severity="error", file=str(source.root), remedy=remedy)
