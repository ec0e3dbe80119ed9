"""Optimizer state and loss scaler in a checkpoint: present, complete, plausible, and matching the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, load
from hallo_numguard.files.preflight.run_spec import RunSpec

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum")
_NONNEGATIVE_STATE = ("square_avg", "sum", "acc_delta", "exp_inf", "exp_avg_sq_row", "exp_avg_sq_col")
_NONNEGATIVE_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum")
_REMEDY = "Go back to a checkpoint with complete state; else the optimizer starts as in a new run."
_NEGATIVE_REMEDY = "A mean of squares cannot be negative: the file is damaged. Go back to an earlier checkpoint."
_SCAN_REMEDY = "scan its weights (hallo-numguard scan)"
_MAX_NAMES = 10  # in a message
_MAX_HALVINGS_LEFT = 3  # of the loss scale before its minimum, for a warning

State = dict[str, dict[str, list[TensorEntry]]]  # pieces by parameter and role


def check(source: Source, spec: RunSpec) -> list[Finding]:
    """Checks the optimizer state and the loss scaler of a checkpoint, but for non-finite values, which the scan finds.

    Reads second moments and step counters only.
    """
    state = _state(source)
    findings = [*_presence(source, state), *_coverage(source, state), *_negatives(source)]
    return [*findings, *_steps(source, state), *_groups(source, spec), *_loss_scale(source)]


def _state(source: Source) -> State:
    state: State = {}
    for entry in source.entries:
        if entry.role in (*_MOMENTS, "fp32", "step"):
            state.setdefault(_owner(entry), {}).setdefault(entry.role, []).append(entry)
    return state


def _owner(entry: TensorEntry) -> str:
    """The parameter of a state: files of torch.save append the state's name, as in optimizer.state.0.exp_avg."""
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
    incomplete = sorted(trained - with_moments)
    if incomplete:
        message = f"{source.root.name} holds no moments of {_some(incomplete)}, but of {len(with_moments)} others"
        yield _finding("missing_state", source, message, incomplete[0])
    for role, other in (("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg")):  # Adamax and Lion have one of the two
        incomplete = sorted(name for name in with_moments if other in state[name] and role not in state[name])
        has_both = any(role in state[name] and other in state[name] for name in with_moments)
        if incomplete and (has_both or _is_adam(source)):
            message = f"{source.root.name} lacks {role} of {_some(incomplete)}"
            yield _finding("missing_state", source, message, incomplete[0])


def _is_adam(source: Source) -> bool:
    """Whether the groups are those of Adam: Lion has no eps, and Adamax another second moment."""
    groups = source.metadata.get("param_groups") or ()
    has_others = any(entry.role == "state" for entry in source.entries)
    return bool(groups) and not has_others and all("eps" in group and "betas" in group for group in groups)


def _coverage(source: Source, state: State) -> Iterator[Finding]:
    """Tensors whose pieces, over all ranks, do not add up to the whole."""
    for name, roles in state.items():
        for role in (*_MOMENTS, "fp32"):
            pieces = roles.get(role, [])
            if not pieces or pieces[0].whole is None:
                continue
            numel = math.prod(pieces[0].whole)
            held = sum({(piece.start, piece.corner): piece.numel for piece in pieces}.values())
            if held != numel:
                message = f"{source.root.name} holds {held} of the {numel} elements of {role} of {name}"
                yield _finding("incomplete_state", source, message, name)


def _negatives(source: Source) -> Iterator[Finding]:
    for entry in source.entries:
        last = entry.name.rpartition(".")[2]
        if entry.role not in _NONNEGATIVE_MOMENTS and not (entry.role == "state" and last in _NONNEGATIVE_STATE):
            continue
        try:
            values = load(entry).flatten()
        except (DamagedFile, OSError):
            continue  # the scan reports it
        if values.numel() and values.dtype.is_floating_point and values.min() < 0:
            lowest = int(values.argmin())
            index = ", ".join(map(str, entry.index_of(lowest)))
            what = entry.name if entry.role == "state" else f"{entry.role} of {_owner(entry)}"
            yield Finding(
                "negative_moment",
                f"{entry.file.name}: {what} is {float(values[lowest]):.4g} at [{index}], and "
                f"{int((values < 0).sum())} values of it are negative",
                name=_owner(entry),
                severity="error",
                file=str(entry.file),
                remedy=_NEGATIVE_REMEDY,
            )


def _steps(source: Source, state: State) -> Iterator[Finding]:
    """Step counters against the run's. They may differ between parameters: layers are unfrozen, or rarely used."""
    counted: dict[int, list[str]] = {}
    for name, roles in state.items():
        for entry in roles.get("step", []):
            counted.setdefault(_number(entry), []).append(name)
    for number, group in enumerate(source.metadata.get("param_groups") or ()):
        if type(group.get("step")) is int:
            counted.setdefault(group["step"], []).append(f"group {number}")
    taken, skipped = (source.metadata.get(key) for key in ("global_steps", "skipped_steps"))
    if type(taken) is not int or not counted:
        return
    if max(counted) > taken + 1:  # stage 0 makes one without gradients first
        message = f"{source.root.name}: the optimizer has counted {max(counted)} steps, and the run {taken}"
        yield _finding("step_counters", source, message)
    if max(counted) == 0 and taken > (skipped if type(skipped) is int else 0):
        message = f"{source.root.name}: the optimizer has counted no step, and the run {taken}"
        yield _finding("step_counters", source, message)


def _number(entry: TensorEntry) -> int:
    try:
        return int(load(entry).flatten()[0])
    except (DamagedFile, OSError, IndexError, ValueError, OverflowError):
        return -1


def _groups(source: Source, spec: RunSpec) -> Iterator[Finding]:
    saved: Sequence[Mapping[str, Any]] = source.metadata.get("param_groups") or ()
    if not saved or not spec.param_groups:
        return
    if len(saved) != len(spec.param_groups):
        message = f"{source.root.name} has {len(saved)} parameter groups, and the optimizer {len(spec.param_groups)}"
        yield _finding(
            "param_groups", source, message, remedy="Build the optimizer with the groups that it was saved with."
        )
        return
    for number, (then, now) in enumerate(zip(saved, spec.param_groups, strict=True)):
        for key in _HYPERPARAMETERS:
            if key in then and key in now and not _same(then[key], now[key]):
                message = f"group {number}: {key} was {then[key]} when {source.root.name} was saved, and is {now[key]}"
                remedy = "load_checkpoint restores the saved value: set it again afterwards if the new one is meant."
                yield Finding("param_groups", message, severity="info", file=str(source.root), remedy=remedy)


def _loss_scale(source: Source) -> Iterator[Finding]:
    """A loss scale so low that the run ends at one of its first overflows."""
    scaler = source.metadata.get("loss_scaler") or {}
    scale, minimum = scaler.get("cur_scale"), scaler.get("min_scale") or 1.0
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        return
    name, file = source.root.name, str(source.root)
    if not math.isfinite(scale) or scale <= 0:
        message = f"{name} was saved with the loss scale {scale}"
        yield Finding("loss_scale", message, severity="error", file=file, remedy="Go back to an earlier checkpoint.")
        return
    if scaler.get("dynamic") is False:
        return
    halvings = max(0, round(math.log2(scale / minimum))) if 0 < minimum < math.inf else 0
    if halvings == 0:
        message = f"{name} was saved at the minimum loss scale ({scale:g}): the first overflow will end the run"
        remedy = f"Every step before it overflowed: go back to an earlier checkpoint, and {_SCAN_REMEDY}."
        yield Finding("loss_scale", message, severity="error", file=file, remedy=remedy)
    elif halvings <= _MAX_HALVINGS_LEFT:
        distance = f"{halvings} halvings above the minimum of {minimum:g}"
        message = f"{name} was saved at loss scale {scale:g}, {distance}: it was overflowing"
        remedy = f"Before resuming, {_SCAN_REMEDY}, or go back to an earlier checkpoint."
        yield Finding("loss_scale", message, file=file, remedy=remedy)


def _same(a: Any, b: Any) -> bool:
    listed = (list, tuple)
    return list(a) == list(b) if isinstance(a, listed) and isinstance(b, listed) else bool(a == b)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _finding(kind: str, source: Source, message: str, name: str = "", remedy: str = _REMEDY) -> Finding:
    return Finding(kind, message, name=name, severity="error", file=str(source.root), remedy=remedy)
