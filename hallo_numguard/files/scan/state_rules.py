"""Rules for the state of optimizers: whether there is any, belongs to the weights, and is possible at all."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, load
from hallo_numguard.files.scan.dead_rules import adapters
from hallo_numguard.files.scan.measured import MeasuredTensor, error, measured
from hallo_numguard.files.scan.reading import ScannedFile
from hallo_numguard.ops.formats import dtype_name

_STATE_NAMES = ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer")
_ADAM_KEYS = ("betas", "alpha", "rho", "etas", "lr_decay", "beta2_decay")  # of optimizers that always have state
_NEGLIGIBLE = 1e-15  # first moments: squares of smaller gradients vanish in float32 too
_MAX_VANISHED = 0.01  # share of second moments that are zero where first ones are not
_SAMPLE = 1 << 14  # values
_MAX_OTHER = 0.02  # share of masters that differ from their weights by more than rounding
_MIN_SAMPLES = 64  # values in common, to judge a tensor
_STEPS_BEHIND = 0.5  # of the run's steps; steps that overflowed are not counted
_MAX_NAMES = 5  # in a message
_FOLDER_STEP = re.compile(r"^(?:checkpoint|step|global_step|iter)[-_]?(\d{1,12})$")
_EMPTY_REMEDY = "The optimizer would start as in a new run: resume from a checkpoint that has its state."
_OTHER_REMEDY = (
    "The optimizer would apply the momentum of one weight to another: take state and weights from the same save."
)
_ORDER_REMEDY = (
    "Right if the optimizer was given its parameters in that order; else build it as it was when it was saved."
)


def check(source: Source, files: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Yields findings on the state of the optimizers in a file or folder.

    Args:
        source: The file or folder, with what is known of its optimizers in the metadata.
        files: Its files as they were read.
    """
    leaves = source.parts or (source,)
    tensors = measured(files)
    for leaf in leaves:
        for optimizer in leaf.metadata.get("optimizers") or ():
            yield from _without_state(source, leaf, optimizer)
            yield from _other_shapes(source, leaf, optimizer)
            yield from _other_step(source, leaf, optimizer)
    yield from _vanished(tensors)
    yield from _other_masters(tensors)
    yield from _other_rank(tensors)
    yield from _other_step_of_rank(tensors)
    yield from _idle_adapter(source, tensors)


def _without_state(source: Source, leaf: Source, optimizer: Mapping[str, Any]) -> Iterator[Finding]:
    """An optimizer with parameters and no state for any of them, after the run has gone on."""
    groups = optimizer["groups"]
    needs = any(any(key in group for key in _ADAM_KEYS) or bool(group.get("momentum")) for group in groups)
    if any(set(state) - {"step"} for state in optimizer["states"].values()) or not needs:
        return
    steps = _progress(source, leaf)
    if steps == 0:
        return
    count = sum(len(group["params"]) for group in groups if isinstance(group.get("params"), list))
    taken = f", after {steps} steps" if steps else ""
    file = next(iter(leaf.files), leaf.root) if leaf.root.is_dir() else leaf.root
    message = f"the optimizer has {count} parameters in its groups and no state for any of them{taken}"
    severity = "error" if steps else "warning"
    yield Finding(
        "no_optimizer_state", f"{file.name}: {message}", severity=severity, file=str(file), remedy=_EMPTY_REMEDY
    )


def _progress(source: Source, leaf: Source) -> int | None:
    """How many steps or epochs the run had made, if the files say so."""
    found = [
        value
        for holder in (source.metadata, leaf.metadata)
        for key in ("trainer_steps", "global_step", "global_steps", "step", "steps", "iteration", "iter", "epoch")
        if type(value := holder.get(key)) is int
    ]
    found += [
        value - (key == "_step_count")
        for part in (source.parts or (leaf,))
        for scheduler in part.metadata.get("schedulers") or ()
        for key in ("last_epoch", "_step_count")
        if type(value := scheduler.get(key)) is int
    ]
    named = _FOLDER_STEP.search(source.root.resolve().name)
    return max([*found, *([int(named[1])] if named else [])], default=None)


def _other_shapes(source: Source, leaf: Source, optimizer: Mapping[str, Any]) -> Iterator[Finding]:
    """Moments of shapes that no weight has, or in another order than the weights of the same file."""
    order = [str(key) for group in optimizer["groups"] for key in (group.get("params") or ())]
    shapes = [_moment_shape(optimizer["states"].get(key, {})) for key in order]
    held = [shape for shape in shapes if shape is not None]
    if not held:
        return
    own = _weights(leaf, optimizer["path"])
    weights = own or [shape for part in source.parts if part is not leaf for shape in _weights(part, "")]
    unknown = sorted((Counter(held) - Counter(weights)).elements())
    matrices = [shape for shape in unknown if sum(size > 1 for size in shape) >= 2]
    total = sum(sum(size > 1 for size in shape) >= 2 for shape in held)
    if not weights or not total:
        return
    name = leaf.root.name
    if matrices and (len(matrices) == total or (own and _is_same_model(held, weights))):
        message = f"{name}: the optimizer has moments of shape {_words(matrices[0])}, and no weight left has it"
        yield Finding("optimizer_shape", message, severity="error", file=str(leaf.root), remedy=_OTHER_REMEDY)
    elif own and not unknown and len(optimizer["groups"]) == 1 and not _is_in_order(held, own):
        message = f"{name}: the optimizer's state has the shapes of the weights in another order than the file has them"
        yield Finding("optimizer_order", message, file=str(leaf.root), remedy=_ORDER_REMEDY)


def _is_in_order(held: Sequence[tuple[int, ...]], weights: Sequence[tuple[int, ...]]) -> bool:
    """Whether the moments' shapes are those of the weights in order, some left out: frozen ones and buffers."""
    remaining = iter(weights)
    return all(any(shape == other for other in remaining) for shape in held)


def _is_same_model(held: Sequence[tuple[int, ...]], weights: Sequence[tuple[int, ...]]) -> bool:
    """Whether most moments do have the shape of a weight: flat shards and projected moments do not."""
    return 2 * sum((Counter(held) & Counter(weights)).values()) >= len(held)


def _moment_shape(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    for key in ("exp_avg", "momentum_buffer", "square_avg", "sum"):
        if isinstance(state.get(key), tuple):
            return tuple(state[key])
    return None


def _weights(leaf: Source, optimizer_path: str) -> list[tuple[int, ...]]:
    """Shapes of the weights in a file, in their order; tied ones once. In a file of several models, of all."""
    seen: set[tuple[Path, int, int]] = set()
    shapes = []
    for entry in leaf.entries:
        place = (entry.file, entry.offset, entry.nbytes)
        if entry.role == "parameter" and entry.dtype.is_floating_point and place not in seen:
            seen.add(place)
            shapes.append(entry.shape)
    return shapes


def _other_step(source: Source, leaf: Source, optimizer: Mapping[str, Any]) -> Iterator[Finding]:
    """An optimizer that has counted other steps than the Trainer beside it."""
    taken = source.metadata.get("trainer_steps")
    counters = {_number(entry) for entry in leaf.entries if entry.role == "step" and entry.numel == 1} | {
        state["step"] for state in optimizer["states"].values() if type(state.get("step")) is int
    }
    counted = max(counters, default=0)
    if type(taken) is int and counted > 0 and not _STEPS_BEHIND * taken <= counted <= taken:
        message = f"{leaf.root.name}: the optimizer has counted {counted} steps, and trainer_state.json {taken}"
        yield Finding("step_counters", message, severity="error", file=str(leaf.root), remedy=_OTHER_REMEDY)


def _number(entry: TensorEntry) -> int:
    try:
        return int(load(entry).flatten()[0])
    except (DamagedFile, OSError, IndexError, ValueError, OverflowError, RuntimeError):
        return 0


def _vanished(tensors: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """Second moments that are zero where first ones are not, which no step can make: they were flushed."""
    pairs: dict[tuple[Path, str, int, int | None], dict[str, MeasuredTensor]] = defaultdict(dict)
    for tensor in tensors:
        entry = tensor.entry
        role = _last(entry) if entry.role == "state" else entry.role
        if role in ("exp_avg", "exp_avg_sq"):
            owner = entry.name.removesuffix(f".{_last(entry)}") if _last(entry) in _STATE_NAMES else entry.name
            pairs[entry.file, owner, entry.start, entry.rank][role] = tensor
    lost = []
    for (_, name, _, _), pair in pairs.items():
        first, second = pair.get("exp_avg"), pair.get("exp_avg_sq")
        if first is not None and second is not None and first.record.absmax > _NEGLIGIBLE:
            share = _share_vanished(first, second)
            if share > _MAX_VANISHED:
                lost.append((name, second.entry, share))
    if lost:
        worst, entry, share = max(lost, key=lambda item: item[2])
        kind = f" in {dtype_name(entry.dtype)}" if entry.dtype.itemsize <= 2 else ""
        message = (
            f"second moments{kind} are zero where first moments are not: {share:.0%} of those of {worst}, "
            f"in {len(lost)} parameters. Each step after resuming would divide by eps"
        )
        remedy = "Save the optimizer's state in float32. This one: keep the weights, and start the optimizer anew."
        yield error("vanished_moments", entry, message, remedy)


def _last(entry: TensorEntry) -> str:
    return entry.name.rpartition(".")[2]


def _share_vanished(first: MeasuredTensor, second: MeasuredTensor) -> float:
    if first.entry.shape != second.entry.shape:
        return 0.0
    if second.is_zero:
        return 1.0
    try:
        means = load(first.entry).flatten()[:_SAMPLE].float().abs()
        squares = load(second.entry).flatten()[:_SAMPLE]
    except (DamagedFile, OSError, RuntimeError):
        return 0.0
    return float(((squares == 0) & (means > _NEGLIGIBLE)).float().mean()) if means.numel() else 0.0


def _other_masters(tensors: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """Master copies that differ from the 16-bit weights by more than rounding: of another rank, step or order."""
    halves = {
        tensor.entry.name: tensor.entry
        for tensor in tensors
        if tensor.entry.role == "parameter" and tensor.entry.dtype in (torch.float16, torch.bfloat16)
    }
    compared, other = 0, []
    for tensor in tensors:
        half = halves.get(tensor.entry.name) if tensor.entry.role == "fp32" else None
        share = None if half is None else _share_other(tensor.entry, half)
        if share is not None:
            compared += 1
            if share > _MAX_OTHER:
                other.append((share, tensor.entry))
    if other:
        share, entry = max(other, key=lambda item: item[0])
        ranks = sorted({one.rank for _, one in other if one.rank is not None})
        of = f" of rank {', '.join(map(str, ranks[:_MAX_NAMES]))}" if ranks else ""
        message = (
            f"master copies{of} differ from the 16-bit weights by more than rounding: {share:.0%} of {entry.name} "
            f"({len(other)} of {compared} pieces): they belong to other weights, or another step"
        )
        yield error("other_masters", entry, message, _OTHER_REMEDY)


def _share_other(master: TensorEntry, half: TensorEntry) -> float | None:
    """Share of a master's first values that are not the weight's, to two units in the last place."""
    if master.whole_shape != half.whole_shape or half.whole is not None or master.corner is not None:
        return None
    if master.numel < _MIN_SAMPLES:
        return None
    try:
        values = load(master).flatten()[:_SAMPLE]
        weights = load(half).flatten()[master.start : master.start + values.numel()]
    except (DamagedFile, OSError, RuntimeError):
        return None
    if weights.numel() != values.numel():
        return None
    rounding = 2 * torch.finfo(half.dtype).eps
    tiny = torch.finfo(half.dtype).smallest_normal
    return float(((values - weights.float()).abs() > rounding * values.abs() + tiny).float().mean())


def _other_rank(tensors: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """Pieces of different ranks that hold the same values, all of them: one rank's file was copied over another's."""
    by_rank: dict[int, list[MeasuredTensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.entry.role == "fp32" and tensor.entry.rank is not None and tensor.entry.numel >= _MIN_SAMPLES:
            by_rank[tensor.entry.rank].append(tensor)
    first: dict[tuple[Any, ...], int] = {}
    for rank, group in sorted(by_rank.items()):
        key = tuple((one.entry.numel, one.record.absmax, one.record.nonfinite) for one in group)
        twin = first.setdefault(key, rank)
        if twin != rank and not all(one.is_constant for one in group) and _is_copy(by_rank[twin], group):
            message = (
                f"the optimizer state of rank {rank} holds the values of rank {twin}'s: one file was copied over it"
            )
            yield error("other_rank", group[0].entry, message, "Copy the file of this rank again.")


def _other_step_of_rank(tensors: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """Ranks whose optimizer has counted other steps than that of the others: their file is of another save."""
    steps: dict[int, set[int]] = defaultdict(set)
    entries = {}
    for entry in (tensor.entry for tensor in tensors):
        if entry.role == "step" and entry.rank is not None:
            steps[entry.rank].add(_number(entry))
            entries[entry.rank] = entry
    common = Counter(frozenset(counted) for counted in steps.values()).most_common(1)
    odd = [rank for rank, counted in sorted(steps.items()) if frozenset(counted) != common[0][0]] if common else []
    if odd:
        counted, usual = (", ".join(map(str, sorted(one))) for one in (steps[odd[0]], common[0][0]))
        message = f"the optimizer of rank {odd[0]} has counted {counted} steps, and that of others {usual}"
        yield error(
            "step_counters", entries[odd[0]], message, "Files of several checkpoints were mixed: copy it again."
        )


def _is_copy(group: Sequence[MeasuredTensor], other: Sequence[MeasuredTensor]) -> bool:
    pairs = zip(group, other, strict=True)
    try:
        return all(torch.equal(load(a.entry).flatten()[:_SAMPLE], load(b.entry).flatten()[:_SAMPLE]) for a, b in pairs)
    except (DamagedFile, OSError):
        return False


def _idle_adapter(source: Source, tensors: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """An adapter that adds nothing although the files beside it say that it was trained."""
    steps = _progress(source, source) or max(
        (_number(one.entry) for one in tensors if one.entry.role == "step"), default=0
    )
    for finding in adapters(tensors):
        remedy = "It was never trained, or saved before: check that its parameters are in the optimizer."
        trained = replace(finding, message=f"{finding.message}, after {steps} steps", severity="error", remedy=remedy)
        yield trained if steps and finding.severity == "info" else finding


def _words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
