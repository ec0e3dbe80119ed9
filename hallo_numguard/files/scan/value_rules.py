"""What the values of tensors tell of a file: each rule is a function from what was measured to findings.

A rule that cannot tell damage from what intact models hold keeps quiet: biases, padding rows and the moments of what
was never trained are zeros, masks hold -Inf.
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
from hallo_numguard.files.formats.mapped import load
from hallo_numguard.files.formats.source import DAMAGED_REMEDY, TensorEntry
from hallo_numguard.files.scan.pages import PAGE
from hallo_numguard.files.scan.reading import FileFacts
from hallo_numguard.ops.formats import dtype_name

WEIGHTS = ("parameter", "fp32")  # roles whose values a model computes with
_STATE_REMEDY = "Go back to an earlier checkpoint: the optimizer would write it into the weights."
_NUMBER = re.compile(r"\d+")
_MASK = re.compile(r"mask|causal", re.IGNORECASE)
_BORN_ZERO = re.compile(
    r"bias|lora_[bB]|lora_embedding_[bB]|hada_w2|adapter|controlnet|zero|gamma|alpha", re.IGNORECASE
)
_EMBEDDING = re.compile(r"emb|wte|wpe|vocab|shared|lm_head", re.IGNORECASE)
_SMALLEST_FAMILY = 4
_SMALLEST_MATRIX = 4096  # elements, from which on one value can be told from the rest
_OUTLIER_BITS = 5.0  # times two that a tensor's absmax may lie above its family's, at least
_OUTLIER_DEVIATIONS = 8.0
_NORMAL_MAD = 1.4826  # standard deviations in a median absolute deviation
_DOMINATES = 0.99  # of a tensor's energy in one element
_MOST_DUPLICATES = 0.1  # of all matrices
_CHUNK = 1 << 20  # elements


Family = tuple[Path, str, tuple[int, ...], str]  # folder, name without numbers, shape, role


@dataclass(frozen=True)
class Measured:
    """A tensor whose bytes were read."""

    entry: TensorEntry
    record: Record

    @property
    def family(self) -> Family:
        """What it has in common with the same tensor of other layers."""
        entry = self.entry
        return entry.file.parent, _NUMBER.sub("*", entry.name), entry.whole_shape, entry.role

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight of two dimensions or more."""
        return self.entry.role in WEIGHTS and len(self.entry.whole_shape) >= 2

    @property
    def is_zero(self) -> bool:
        """Whether all of it is zeros."""
        return self.entry.numel > 0 and self.record.absmax == 0 and self.record.nonfinite == 0

    @property
    def is_constant(self) -> bool:
        """Whether all of it is the same number, but for the sign: only then its energy is as large as can be."""
        return self.record.sumsq >= self.record.absmax * self.record.absmax * self.entry.numel * (1 - 1e-5)


def judge(measured: Sequence[Measured], facts: Iterable[FileFacts], dtype: torch.dtype | None) -> list[Finding]:
    """Returns what all rules find.

    Args:
        measured: The tensors of one model or checkpoint.
        facts: Of the files in which they lie.
        dtype: That the weights will be converted to; None if that is not known.

    Cost: reads again only what is suspicious.
    """
    findings = [finding for rule in _RULES for finding in rule(measured)]
    findings += unholdable(measured, dtype)
    for fact in facts:
        inside = [one.entry for one in measured if one.entry.file == fact.path]
        findings += [*mismatches(fact), *zero_pages(fact, inside), *repeated_pages(fact, inside)]
    return findings


def nonfinite(measured: Sequence[Measured]) -> Iterator[Finding]:
    """NaN and infinity. -Inf alone is how masks are written."""
    for one in measured:
        if one.record.nonfinite:
            is_mask = _MASK.search(one.entry.name) is not None and one.record.nonfinite == one.record.neg_inf
            offender = offender_of(one)
            yield Finding(
                "nonfinite",
                f"{one.entry.file.name}: {offender}",
                name=one.entry.name,
                offender=offender,
                severity="info" if is_mask else "error",
                file=str(one.entry.file),
                remedy="" if is_mask else _remedy(one.entry),
            )


def offender_of(one: Measured) -> Offender:
    """Returns what is not finite in a tensor."""
    entry, record = one.entry, one.record
    return Offender(
        kind=entry.role if entry.role in ("parameter", "buffer") else "optimizer_state",
        name=entry.name if entry.role in ("parameter", "buffer") else f"{entry.role} of {entry.name}",
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


def unholdable(measured: Sequence[Measured], dtype: torch.dtype | None) -> Iterator[Finding]:
    """Finite values that the training dtype cannot hold: a flipped exponent bit is Inf after `.half()`."""
    if dtype is None:
        return
    for one in measured:
        if one.entry.role in (*WEIGHTS, "buffer") and becomes_infinite(one.record.absmax, dtype):
            yield _unholdable(one.entry, dtype)


def becomes_infinite(value: float, dtype: torch.dtype) -> bool:
    """Returns whether a finite value is infinite, or no number, after it was converted."""
    return not torch.tensor(value, dtype=torch.float64).to(dtype).isfinite().item()


def _unholdable(entry: TensorEntry, dtype: torch.dtype) -> Finding:
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
        "unholdable",
        f"{entry.file.name}: {entry.role} {entry.name}[{index}] is {value:.3g}, finite in {dtype_name(entry.dtype)} "
        f"and infinite in {dtype_name(dtype)}: {count} such of {entry.numel} values",
        name=entry.name,
        severity="info" if is_mask else "error",
        file=str(entry.file),
        remedy="" if is_mask else f"{DAMAGED_REMEDY} If the value is meant, train in bfloat16 or float32.",
    )


def all_zero(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Weight matrices that are all zeros, unless they are born so or all of their family are."""
    families = _families(measured)
    for one in measured:
        entry = one.entry
        is_small_piece = entry.whole is not None and entry.numel < _SMALLEST_MATRIX
        if not (one.is_zero and one.is_matrix) or is_small_piece or _BORN_ZERO.search(entry.name):
            continue
        family = families[one.family]
        if len(family) == 1 or not all(member.is_zero for member in family):
            yield _warning(
                "all_zero", entry, f"{entry.role} {entry.name} is all zeros ({entry.numel} values)", DAMAGED_REMEDY
            )


def outliers(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Weights far larger than the same weight in other layers, and single values that outweigh all others."""
    far = {id(one): median for family in _families(measured).values() for one, median in _far_above(family)}
    for one in measured:
        if one.entry.role not in WEIGHTS:
            continue
        if id(one) in far:
            what = f"up to {one.record.absmax:.3g}, and in the same weight of other layers {far[id(one)]:.3g}"
        elif _is_dominated(one):
            mean = math.sqrt(one.record.sumsq / one.entry.numel)
            what = f"up to {one.record.absmax:.3g}, one value that outweighs all others (root mean square {mean:.3g})"
        else:
            continue
        yield _warning("outlier", one.entry, f"{one.entry.role} {one.entry.name} is {what}", DAMAGED_REMEDY)


def _far_above(family: Sequence[Measured]) -> Iterator[tuple[Measured, float]]:
    """Members whose absmax is far above the median, in robust deviations of its logarithm, and the median."""
    sizes = [(one, math.log2(one.record.absmax)) for one in family if one.record.absmax > 0]
    if len(sizes) < _SMALLEST_FAMILY:
        return
    median = statistics.median(size for _, size in sizes)
    deviation = _NORMAL_MAD * statistics.median(abs(size - median) for _, size in sizes)
    limit = max(_OUTLIER_BITS, _OUTLIER_DEVIATIONS * deviation)
    for one, size in sizes:
        if size > median + limit:
            yield one, 2**median


def _is_dominated(one: Measured) -> bool:
    if not one.is_matrix or one.entry.numel < _SMALLEST_MATRIX or _BORN_ZERO.search(one.entry.name):
        return False
    return one.record.absmax * one.record.absmax > _DOMINATES * one.record.sumsq


def duplicates(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Weights of a layer that hold the values of another's, where hardly any others do: one stands for the other.

    Models whose layers were copied, or initialised alike, hold many such; tied weights are so in all of their family.
    """
    matrices = [one for one in measured if one.is_matrix and _NUMBER.search(one.entry.name) and not one.is_constant]
    families = _families(matrices)
    groups = defaultdict(list)
    for one in matrices:
        if any(member.record.absmax != one.record.absmax for member in families[one.family]):
            groups[one.entry.file.parent, one.entry.shape, one.entry.dtype, one.record.absmax].append(one)
    pairs = [pair for group in groups.values() for pair in itertools.pairwise(group) if _look_alike(*pair)]
    if len(pairs) > _MOST_DUPLICATES * len(matrices):
        return
    for first, one in pairs:
        if torch.equal(load(first.entry), load(one.entry)):
            message = f"{one.entry.role} {one.entry.name} holds the very values of {first.entry.name}"
            yield _warning("duplicate", one.entry, message, "Check which of them it is; load an intact copy.")


def _look_alike(one: Measured, other: Measured) -> bool:
    """Whether two tensors of the same shape and absmax may be the same; sums depend on where a tensor lies."""
    return one.entry.name != other.entry.name and math.isclose(one.record.sumsq, other.record.sumsq, rel_tol=1e-5)


def dtype_surprises(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Tensors of another dtype than nearly all of their family."""
    for family in _families(measured).values():
        (usual, count), *others = Counter(one.entry.dtype for one in family).most_common()
        if not others or count < 3 * (len(family) - count):
            continue
        for one in family:
            if one.entry.dtype != usual:
                found = f"{one.entry.role} {one.entry.name} is {dtype_name(one.entry.dtype)}"
                message = f"{found}, and in other layers {dtype_name(usual)}"
                yield _warning("dtype", one.entry, message, "Check what wrote it; convert it, or load an intact copy.")


def mismatches(facts: FileFacts) -> Iterator[Finding]:
    """Bytes that are not those that were written: the file says so itself."""
    for checksum in facts.mismatches:
        yield Finding(
            "checksum",
            f"{facts.path.name}: the bytes of record {checksum.name} have changed since they were written (CRC-32)",
            severity="error",
            file=str(facts.path),
            remedy=f"{DAMAGED_REMEDY} torch.load does not notice.",
        )


def zero_pages(facts: FileFacts, entries: Sequence[TensorEntry]) -> Iterator[Finding]:
    """Zeros that begin and end where pages of the file do, in a weight that holds other values."""
    for offset, nbytes in facts.zero_pages:
        for entry in _at(entries, offset, nbytes):
            begin, end = max(offset, entry.offset), min(offset + nbytes, entry.offset + entry.nbytes)
            if end - begin >= PAGE and _is_lost(entry, begin, end):
                message = (
                    f"{end - begin} bytes of {entry.role} {entry.name} are zeros, exactly from page to page of the "
                    f"file (offset {begin}): they were not written"
                )
                yield _error("zero_pages", entry, message)


def _is_lost(entry: TensorEntry, begin: int, end: int) -> bool:
    """Whether zeros stop where the page does, and are not rows of an embedding, or all of the tensor."""
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


def repeated_pages(facts: FileFacts, entries: Sequence[TensorEntry]) -> Iterator[Finding]:
    """Pages of a weight that are those of another place in the file, where what is around them is not."""
    for offset, other, nbytes in facts.repeated_pages:
        for entry in _at(entries, offset, nbytes):
            if entry.offset <= offset and offset + nbytes <= entry.offset + entry.nbytes:
                origin = next(iter(_at(entries, other, nbytes)), entry)
                if not _is_copied(entry, origin, offset, other, nbytes):
                    message = (
                        f"{nbytes} bytes of {entry.role} {entry.name} (offset {offset} of the file) are those of "
                        f"{origin.name} (offset {other}), exactly from page to page: written to the wrong place"
                    )
                    yield _error("repeated_pages", entry, message)


def _is_copied(entry: TensorEntry, origin: TensorEntry, offset: int, other: int, nbytes: int) -> bool:
    """Whether the values around the pages are the same too: a model that holds something twice."""
    values, others = load(entry).view(torch.uint8).flatten(), load(origin).view(torch.uint8).flatten()
    here, there = offset - entry.offset, other - origin.offset
    size = entry.dtype.itemsize
    if here == there == 0 and entry.nbytes == origin.nbytes:
        return bool(torch.equal(values, others))
    before = here >= size and there >= size and torch.equal(values[here - size : here], others[there - size : there])
    here, there = here + nbytes, there + nbytes
    after = torch.equal(values[here : here + size], others[there : there + size]) and here < entry.nbytes
    return before or after


def _at(entries: Iterable[TensorEntry], offset: int, nbytes: int) -> Iterator[TensorEntry]:
    """Weights that have bytes in a run."""
    for entry in entries:
        if entry.role in WEIGHTS and entry.offset < offset + nbytes and offset < entry.offset + entry.nbytes:
            yield entry


def _families(measured: Iterable[Measured]) -> dict[Family, list[Measured]]:
    families = defaultdict(list)
    for one in measured:
        families[one.family].append(one)
    return families


def _warning(kind: str, entry: TensorEntry, message: str, remedy: str) -> Finding:
    return Finding(kind, f"{entry.file.name}: {message}", name=entry.name, file=str(entry.file), remedy=remedy)


def _error(kind: str, entry: TensorEntry, message: str) -> Finding:
    text = f"{entry.file.name}: {message}"
    return Finding(kind, text, name=entry.name, severity="error", file=str(entry.file), remedy=_remedy(entry))


def _remedy(entry: TensorEntry) -> str:
    return DAMAGED_REMEDY if entry.role in ("parameter", "buffer") else _STATE_REMEDY


_RULES: tuple[Callable[[Sequence[Measured]], Iterator[Finding]], ...] = (
    nonfinite,
    all_zero,
    outliers,
    duplicates,
    dtype_surprises,
)
