"""Rules for tensor values: each is a function from scanned tensors to findings.

A rule that cannot distinguish damage from intact values reports nothing: biases, padding rows and the moments of
untrained parameters are zeros, masks hold -Inf, and trackers of a best value begin with infinity.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Offender, Record
from hallo_numguard.files.formats.source import DAMAGED_REMEDY, TensorEntry, load
from hallo_numguard.files.scan import dead_rules, page_rules
from hallo_numguard.files.scan.measured import (
    NUMBER,
    WEIGHTS,
    ZERO_INITIALISED,
    MeasuredTensor,
    Tensors,
    families,
    measured,
    remedy_for,
    warning,
)
from hallo_numguard.files.scan.reading import ScannedFile
from hallo_numguard.ops.formats import dtype_name

_MASK = re.compile(r"mask|causal", re.IGNORECASE)
_TRACKER = re.compile(r"best|kth|worst|lowest|highest|(^|[._])(min|max)(_|$)|_(min|max)$", re.IGNORECASE)
_LEARNT = re.compile(
    r"(weight|bias|kernel|weight_[gv]|in_proj|scale\w*|scales|temperature|gamma|alpha|beta|gain|token|embed\w*|running_\w+|table|lora_\w*)$"
)
_MIN_FAMILY = 4  # layers, for a meaningful median
_MIN_MATRIX_NUMEL = 4096  # smaller matrices can have a dominant value
_MIN_OUTLIER_BITS = 5.0  # binary orders of magnitude above the family's median absmax
_MIN_OUTLIER_DEVIATIONS = 8.0
_MAD_TO_SIGMA = 1.4826  # standard deviations in a median absolute deviation, for normal values
_DOMINANT_ENERGY = 0.99  # share of a tensor's sum of squares in one element
_MAX_DUPLICATE_SHARE = 0.1  # of all matrices; with more, the model is meant so
_CHUNK = 1 << 20  # elements


def judge(files: Sequence[ScannedFile], dtype: torch.dtype | None) -> list[Finding]:
    """Returns the findings of all rules. Reads suspicious tensors again.

    Args:
        files: Files of one model or checkpoint.
        dtype: Dtype that the weights will be converted to, if known.
    """
    tensors = measured(files)
    findings = [finding for rule in _RULES for finding in rule(tensors)]
    findings += overflows_dtype(tensors, dtype)
    return [*findings, *(finding for file in files for finding in page_rules.check(file))]


def nonfinite(tensors: Tensors) -> Iterator[Finding]:
    """NaN and infinity; infinity that is meant is for information: in masks, bounds and trackers of a best value."""
    bad = [tensor for tensor in tensors if tensor.record.nonfinite]
    sound = _by_rest(tensor for tensor in tensors if not tensor.record.nonfinite) if bad else {}
    for tensor in bad:
        entry, record = tensor.entry, tensor.record
        offender = _offender(entry, record)
        is_meant = _is_meant(tensor)
        copy = sound.get((_rest(entry.name), entry.whole_shape)) if "." in entry.name else None
        known = f" The copy {copy} in the same folder is sound." if copy and entry.role == "parameter" else ""
        yield Finding(
            "nonfinite",
            f"{entry.file.name}: {offender}",
            name=entry.name,
            offender=offender,
            severity="info" if is_meant else "error",
            file=str(entry.file),
            remedy="" if is_meant else remedy_for(entry) + known,
        )


def _by_rest(tensors: Iterator[MeasuredTensor]) -> dict[tuple[str, tuple[int, ...]], str]:
    return {(_rest(tensor.entry.name), tensor.entry.whole_shape): tensor.entry.name for tensor in tensors}


def _rest(name: str) -> str:
    """A name without its first part, which may say that it is a copy (ema, model)."""
    return name.partition(".")[2]


def _is_meant(tensor: MeasuredTensor) -> bool:
    """Whether infinities begin a search for the best value, or switch entries off."""
    entry, record = tensor.entry, tensor.record
    if record.nan or entry.role not in (*WEIGHTS, "buffer"):
        return False
    is_negative = record.nonfinite == record.neg_inf
    if is_negative and _MASK.search(entry.name):
        return True
    if _LEARNT.search(entry.name):
        return False
    is_everything = record.nonfinite == entry.numel
    if is_negative and (is_everything or record.absmax == 0):
        return True
    return is_everything and (not tensor.is_matrix or _TRACKER.search(entry.name) is not None)


def _offender(entry: TensorEntry, record: Record) -> Offender:
    is_state = entry.role not in ("parameter", "buffer")
    return Offender(
        kind="optimizer_state" if is_state else entry.role,
        name=f"{entry.role} of {entry.name}" if is_state else entry.name,
        module=entry.name.rpartition(".")[0],
        rank=entry.rank,
        index=entry.index_of(record.first_nonfinite),
        nan=record.nan,
        pos_inf=record.pos_inf,
        neg_inf=record.neg_inf,
        absmax=record.absmax,
        numel=math.prod(entry.whole_shape),
        shape=entry.whole_shape,
        dtype=dtype_name(entry.dtype),
    )


def overflows_dtype(tensors: Tensors, dtype: torch.dtype | None) -> Iterator[Finding]:
    """Finite values that overflow the training dtype: a flipped exponent bit becomes Inf in `.half()`."""
    if dtype is None:
        return
    for tensor in tensors:
        is_value = tensor.entry.role in (*WEIGHTS, "buffer") and not tensor.is_scale
        if is_value and not tensor.entry.dtype.is_complex and _overflows(tensor.record.absmax, dtype):
            yield _overflow(tensor.entry, dtype)


def _overflows(value: float, dtype: torch.dtype) -> bool:
    """Whether a finite value becomes infinite or NaN by conversion."""
    return not torch.tensor(value, dtype=torch.float64).to(dtype).isfinite().item()


def _overflow(entry: TensorEntry, dtype: torch.dtype) -> Finding:
    count, first, value = 0, -1, 0.0
    values = load(entry).flatten()
    for begin in range(0, values.numel(), _CHUNK):
        chunk = values[begin : begin + _CHUNK]
        lost = (chunk.isfinite() & ~chunk.to(dtype).isfinite()).nonzero().flatten()
        if count == 0 and lost.numel():
            first, value = begin + int(lost[0]), float(chunk[lost[0]])
        count += lost.numel()
    index = ", ".join(map(str, replace(entry, stride=None).index_of(first)))
    is_mask = _MASK.search(entry.name) is not None
    return Finding(
        "overflows_dtype",
        f"{entry.file.name}: {entry.role} {entry.name}[{index}] is {value:.3g}, finite in {dtype_name(entry.dtype)} "
        f"but infinite in {dtype_name(dtype)}: {count} of {entry.numel} values",
        name=entry.name,
        severity="info" if is_mask else "error",
        file=str(entry.file),
        remedy="" if is_mask else f"{DAMAGED_REMEDY} If the value is meant, train in bfloat16 or float32.",
    )


def outliers(tensors: Tensors) -> Iterator[Finding]:
    """Weights far larger than the same weight in other layers, and single values that outweigh all others."""
    medians = {id(tensor): median for family in families(tensors).values() for tensor, median in _far_above(family)}
    for tensor in tensors:
        entry, record = tensor.entry, tensor.record
        if entry.role not in WEIGHTS or tensor.is_scale:
            continue
        if id(tensor) in medians:
            what = f"up to {record.absmax:.3g}, and in the same weight of other layers {medians[id(tensor)]:.3g}"
        elif _is_dominated(tensor):
            mean = math.sqrt(record.sumsq / entry.numel)
            what = f"up to {record.absmax:.3g}, one value that outweighs all others (root mean square {mean:.3g})"
        else:
            continue
        yield warning("outlier", entry, f"{entry.role} {entry.name} is {what}", DAMAGED_REMEDY)


def _far_above(family: Tensors) -> Iterator[tuple[MeasuredTensor, float]]:
    """Members whose absmax is far above the median, in robust deviations of its logarithm, and the median."""
    logs = [(tensor, math.log2(tensor.record.absmax)) for tensor in family if tensor.record.absmax > 0]
    if len(logs) < _MIN_FAMILY:
        return
    median = statistics.median(log for _, log in logs)
    deviation = _MAD_TO_SIGMA * statistics.median(abs(log - median) for _, log in logs)
    limit = max(_MIN_OUTLIER_BITS, _MIN_OUTLIER_DEVIATIONS * deviation)
    for tensor, log in logs:
        if log > median + limit:
            yield tensor, 2**median


def _is_dominated(tensor: MeasuredTensor) -> bool:
    entry, record = tensor.entry, tensor.record
    if not tensor.is_matrix or entry.numel < _MIN_MATRIX_NUMEL or ZERO_INITIALISED.search(entry.name):
        return False
    return record.absmax * record.absmax > _DOMINANT_ENERGY * record.sumsq


def duplicates(tensors: Tensors) -> Iterator[Finding]:
    """Weights equal to those of another layer where hardly any others are: one was written in place of the other.

    Models whose layers were copied or initialised alike hold many such pairs; tied weights are equal in all layers.
    """
    matrices = [one for one in tensors if one.is_matrix and NUMBER.search(one.entry.name) and not one.is_constant]
    extremes = {key: {one.record.absmax for one in family} for key, family in families(matrices).items()}
    groups = defaultdict(list)
    for tensor in matrices:
        if len(extremes[tensor.family]) > 1:
            entry = tensor.entry
            groups[entry.file.parent, entry.shape, entry.dtype, tensor.record.absmax].append(tensor)
    pairs = [pair for group in groups.values() for pair in itertools.pairwise(group) if _may_be_equal(*pair)]
    if len(pairs) > _MAX_DUPLICATE_SHARE * len(matrices):
        return
    for first, second in pairs:
        if torch.equal(load(first.entry), load(second.entry)):
            message = f"{second.entry.role} {second.entry.name} holds the same values as {first.entry.name}"
            yield warning("duplicate", second.entry, message, "Check which of the two it is; load an intact copy.")


def _may_be_equal(first: MeasuredTensor, second: MeasuredTensor) -> bool:
    """Whether tensors of equal shape and absmax may be equal. Sums of squares depend on the alignment in the file."""
    is_close = math.isclose(first.record.sumsq, second.record.sumsq, rel_tol=1e-5)
    return first.entry.name != second.entry.name and is_close


def dtype_differences(tensors: Tensors) -> Iterator[Finding]:
    """A tensor of another dtype than the same weight in nearly all other layers, alone in its layer.

    Whole layers, and weights beside quantized ones, are kept in another dtype by design.
    """
    odd: list[tuple[TensorEntry, torch.dtype]] = []
    for family in families(tensors).values():
        (usual, count), *others = Counter(tensor.entry.dtype for tensor in family).most_common()
        if others and count >= 3 * (len(family) - count):
            odd += [(tensor.entry, usual) for tensor in family if tensor.entry.dtype != usual]
    layers = Counter((entry.file.parent, _layer(entry.name)) for entry, _ in odd)
    for entry, usual in odd:
        if min(entry.dtype.itemsize, usual.itemsize) > 1 and layers[entry.file.parent, _layer(entry.name)] == 1:
            own = f"{entry.role} {entry.name} is {dtype_name(entry.dtype)}"
            message = f"{own}, and in other layers {dtype_name(usual)}"
            yield warning("dtype", entry, message, "Check what wrote it; convert it, or load an intact copy.")


def _layer(name: str) -> str:
    """The name up to its last number."""
    numbers = list(NUMBER.finditer(name))
    return name[: numbers[-1].end()] if numbers else ""


_RULES: tuple[Callable[[Tensors], Iterator[Finding]], ...] = (
    nonfinite,
    dead_rules.check,
    outliers,
    duplicates,
    dtype_differences,
)
