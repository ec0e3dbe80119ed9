"""Rules for tensor values: each is a function from scanned tensors or files to findings.

A rule that cannot distinguish damage from intact values reports nothing: biases, padding rows and the moments of
untrained parameters are zeros, and masks hold -Inf.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Offender, Record
from hallo_numguard.files.formats.source import DAMAGED_REMEDY, TensorEntry, load
from hallo_numguard.files.scan.pages import PAGE
from hallo_numguard.files.scan.reading import ScannedFile
from hallo_numguard.ops.formats import dtype_name

WEIGHTS = ("parameter", "fp32")  # roles of the values that a model computes with
_STATE_REMEDY = "Go back to an earlier checkpoint: the optimizer would write it into the weights."
_NUMBER = re.compile(r"\d+")
_MASK = re.compile(r"mask|causal", re.IGNORECASE)
_ZERO_INITIALISED = re.compile(
    r"bias|lora_[bB]|lora_embedding_[bB]|hada_w2|adapter|controlnet|zero|gamma|alpha", re.IGNORECASE
)
_EMBEDDING = re.compile(r"emb|wte|wpe|vocab|shared|lm_head", re.IGNORECASE)
_MIN_FAMILY = 4  # layers, for a meaningful median
_MIN_MATRIX_NUMEL = 4096  # smaller matrices can have a dominant value, or be all zeros in a piece
_MIN_OUTLIER_BITS = 5.0  # binary orders of magnitude above the family's median absmax
_MIN_OUTLIER_DEVIATIONS = 8.0
_MAD_TO_SIGMA = 1.4826  # standard deviations in a median absolute deviation, for normal values
_DOMINANT_ENERGY = 0.99  # share of a tensor's sum of squares in one element
_MAX_DUPLICATE_SHARE = 0.1  # of all matrices; with more, the model is meant so
_CHUNK = 1 << 20  # elements

Family = tuple[Path, str, tuple[int, ...], str]  # folder, name without numbers, shape, role


@dataclass(frozen=True)
class MeasuredTensor:
    """A floating-point tensor and the statistics of its values."""

    entry: TensorEntry
    record: Record

    @property
    def family(self) -> Family:
        """Common key of the same tensor in all layers."""
        entry = self.entry
        return entry.file.parent, _NUMBER.sub("*", entry.name), entry.whole_shape, entry.role

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight of two or more dimensions."""
        return self.entry.role in WEIGHTS and len(self.entry.whole_shape) >= 2

    @property
    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return self.entry.numel > 0 and self.record.absmax == 0 and self.record.nonfinite == 0

    @property
    def is_constant(self) -> bool:
        """Whether all values have the same magnitude: only then is the sum of squares as large as it can be."""
        return self.record.sumsq >= self.record.absmax * self.record.absmax * self.entry.numel * (1 - 1e-5)


Tensors = Sequence[MeasuredTensor]


def judge(files: Sequence[ScannedFile], dtype: torch.dtype | None) -> list[Finding]:
    """Returns the findings of all rules. Reads suspicious tensors again.

    Args:
        files: Files of one model or checkpoint.
        dtype: Dtype that the weights will be converted to, if known.
    """
    by_file = {
        file.path: [MeasuredTensor(t.entry, t.record) for t in file.tensors if t.record is not None] for file in files
    }
    tensors = [tensor for group in by_file.values() for tensor in group]
    findings = [finding for rule in _RULES for finding in rule(tensors)]
    findings += overflows_dtype(tensors, dtype)
    for file in files:
        entries = [tensor.entry for tensor in by_file[file.path]]
        findings += [*checksum_mismatches(file), *zero_pages(file, entries), *repeated_pages(file, entries)]
    return findings


def nonfinite(tensors: Tensors) -> Iterator[Finding]:
    """NaN and infinity; -Inf alone in a mask is for information."""
    for tensor in tensors:
        entry, record = tensor.entry, tensor.record
        if record.nonfinite:
            is_mask = _MASK.search(entry.name) is not None and record.nonfinite == record.neg_inf
            offender = _offender(entry, record)
            yield Finding(
                "nonfinite",
                f"{entry.file.name}: {offender}",
                name=entry.name,
                offender=offender,
                severity="info" if is_mask else "error",
                file=str(entry.file),
                remedy="" if is_mask else _remedy(entry),
            )


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
        if tensor.entry.role in (*WEIGHTS, "buffer") and _overflows(tensor.record.absmax, dtype):
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


def all_zero(tensors: Tensors) -> Iterator[Finding]:
    """Weight matrices that are all zeros, unless initialised so or zero in all layers."""
    families = _families(tensors)
    for tensor in tensors:
        entry = tensor.entry
        is_small_piece = entry.whole is not None and entry.numel < _MIN_MATRIX_NUMEL
        if not (tensor.is_zero and tensor.is_matrix) or is_small_piece or _ZERO_INITIALISED.search(entry.name):
            continue
        family = families[tensor.family]
        if len(family) == 1 or not all(member.is_zero for member in family):
            message = f"{entry.role} {entry.name} is all zeros ({entry.numel} values)"
            yield _warning("all_zero", entry, message, DAMAGED_REMEDY)


def outliers(tensors: Tensors) -> Iterator[Finding]:
    """Weights far larger than the same weight in other layers, and single values that outweigh all others."""
    medians = {id(tensor): median for family in _families(tensors).values() for tensor, median in _far_above(family)}
    for tensor in tensors:
        entry, record = tensor.entry, tensor.record
        if entry.role not in WEIGHTS:
            continue
        if id(tensor) in medians:
            what = f"up to {record.absmax:.3g}, and in the same weight of other layers {medians[id(tensor)]:.3g}"
        elif _is_dominated(tensor):
            mean = math.sqrt(record.sumsq / entry.numel)
            what = f"up to {record.absmax:.3g}, one value that outweighs all others (root mean square {mean:.3g})"
        else:
            continue
        yield _warning("outlier", entry, f"{entry.role} {entry.name} is {what}", DAMAGED_REMEDY)


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
    if not tensor.is_matrix or entry.numel < _MIN_MATRIX_NUMEL or _ZERO_INITIALISED.search(entry.name):
        return False
    return record.absmax * record.absmax > _DOMINANT_ENERGY * record.sumsq


def duplicates(tensors: Tensors) -> Iterator[Finding]:
    """Weights equal to those of another layer where hardly any others are: one was written in place of the other.

    Models whose layers were copied or initialised alike hold many such pairs; tied weights are equal in all layers.
    """
    matrices = [one for one in tensors if one.is_matrix and _NUMBER.search(one.entry.name) and not one.is_constant]
    families = _families(matrices)
    groups = defaultdict(list)
    for tensor in matrices:
        if any(member.record.absmax != tensor.record.absmax for member in families[tensor.family]):
            entry = tensor.entry
            groups[entry.file.parent, entry.shape, entry.dtype, tensor.record.absmax].append(tensor)
    pairs = [pair for group in groups.values() for pair in itertools.pairwise(group) if _may_be_equal(*pair)]
    if len(pairs) > _MAX_DUPLICATE_SHARE * len(matrices):
        return
    for first, second in pairs:
        if torch.equal(load(first.entry), load(second.entry)):
            message = f"{second.entry.role} {second.entry.name} holds the same values as {first.entry.name}"
            yield _warning("duplicate", second.entry, message, "Check which of the two it is; load an intact copy.")


def _may_be_equal(first: MeasuredTensor, second: MeasuredTensor) -> bool:
    """Whether tensors of equal shape and absmax may be equal. Sums of squares depend on the alignment in the file."""
    is_close = math.isclose(first.record.sumsq, second.record.sumsq, rel_tol=1e-5)
    return first.entry.name != second.entry.name and is_close


def dtype_differences(tensors: Tensors) -> Iterator[Finding]:
    """Tensors of another dtype than nearly all of the same weight in other layers."""
    for family in _families(tensors).values():
        (usual, count), *others = Counter(tensor.entry.dtype for tensor in family).most_common()
        if not others or count < 3 * (len(family) - count):
            continue
        for entry in (tensor.entry for tensor in family if tensor.entry.dtype != usual):
            own = f"{entry.role} {entry.name} is {dtype_name(entry.dtype)}"
            message = f"{own}, and in other layers {dtype_name(usual)}"
            yield _warning("dtype", entry, message, "Check what wrote it; convert it, or load an intact copy.")


def checksum_mismatches(file: ScannedFile) -> Iterator[Finding]:
    """Records whose CRC-32 is not the one stored in the file."""
    for checksum in file.mismatches:
        yield Finding(
            "checksum",
            f"{file.path.name}: the bytes of record {checksum.name} have changed since they were written (CRC-32)",
            severity="error",
            file=str(file.path),
            remedy=f"{DAMAGED_REMEDY} torch.load does not notice.",
        )


def zero_pages(file: ScannedFile, entries: Sequence[TensorEntry]) -> Iterator[Finding]:
    """Zeros that begin and end at page boundaries, in a weight with other values."""
    for offset, nbytes in file.zero_pages:
        for entry in _weights_at(entries, offset, nbytes):
            begin, end = max(offset, entry.offset), min(offset + nbytes, entry.offset + entry.nbytes)
            if end - begin >= PAGE and _was_lost(entry, begin, end):
                message = (
                    f"{end - begin} bytes of {entry.role} {entry.name} are zeros, exactly from page to page of the "
                    f"file (offset {begin}): they were not written"
                )
                yield _error("zero_pages", entry, message)


def _was_lost(entry: TensorEntry, begin: int, end: int) -> bool:
    """Whether zeros end exactly with the pages, and are neither rows of an embedding nor the whole tensor."""
    if entry.stride is not None or end - begin == entry.nbytes:
        return False
    values = load(entry).flatten()
    size = entry.dtype.itemsize
    first, last = -(-(begin - entry.offset) // size), (end - entry.offset) // size
    if (first > 0 and values[first - 1] == 0) or (last < values.numel() and values[last] == 0):
        return False
    row = math.prod(entry.whole_shape[1:])
    is_rows = (entry.start + first) % row == 0 and (entry.start + last) % row == 0
    return not (_EMBEDDING.search(entry.name) and is_rows)


def repeated_pages(file: ScannedFile, entries: Sequence[TensorEntry]) -> Iterator[Finding]:
    """Pages of a weight that repeat earlier ones of the file, while the values around them do not."""
    for offset, earlier, nbytes in file.repeated_pages:
        for entry in _weights_at(entries, offset, nbytes):
            if entry.offset <= offset and offset + nbytes <= entry.offset + entry.nbytes:
                origin = next(iter(_weights_at(entries, earlier, nbytes)), entry)
                if not _is_copy(entry, origin, offset, earlier, nbytes):
                    message = (
                        f"{nbytes} bytes of {entry.role} {entry.name} (offset {offset} of the file) are those of "
                        f"{origin.name} (offset {earlier}), exactly from page to page: written to the wrong place"
                    )
                    yield _error("repeated_pages", entry, message)


def _is_copy(entry: TensorEntry, origin: TensorEntry, offset: int, earlier: int, nbytes: int) -> bool:
    """Whether the values around the pages are equal too: the model holds something twice."""
    values, others = load(entry).view(torch.uint8).flatten(), load(origin).view(torch.uint8).flatten()
    here, there = offset - entry.offset, earlier - origin.offset
    size = entry.dtype.itemsize
    if here == there == 0 and entry.nbytes == origin.nbytes:
        return bool(torch.equal(values, others))
    before = here >= size and there >= size and torch.equal(values[here - size : here], others[there - size : there])
    here, there = here + nbytes, there + nbytes
    after = torch.equal(values[here : here + size], others[there : there + size]) and here < entry.nbytes
    return before or after


def _weights_at(entries: Iterable[TensorEntry], offset: int, nbytes: int) -> Iterator[TensorEntry]:
    """Weights with bytes in part of the file."""
    for entry in entries:
        if entry.role in WEIGHTS and entry.offset < offset + nbytes and offset < entry.offset + entry.nbytes:
            yield entry


def _families(tensors: Iterable[MeasuredTensor]) -> dict[Family, list[MeasuredTensor]]:
    families = defaultdict(list)
    for tensor in tensors:
        families[tensor.family].append(tensor)
    return families


def _warning(kind: str, entry: TensorEntry, message: str, remedy: str) -> Finding:
    return Finding(kind, f"{entry.file.name}: {message}", name=entry.name, file=str(entry.file), remedy=remedy)


def _error(kind: str, entry: TensorEntry, message: str) -> Finding:
    return replace(_warning(kind, entry, message, _remedy(entry)), severity="error")


def _remedy(entry: TensorEntry) -> str:
    return DAMAGED_REMEDY if entry.role in ("parameter", "buffer") else _STATE_REMEDY


_RULES: tuple[Callable[[Tensors], Iterator[Finding]], ...] = (
    nonfinite,
    all_zero,
    outliers,
    duplicates,
    dtype_differences,
)
