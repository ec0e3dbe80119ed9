"""Rules for weights that cannot be weights: none, zeros, one value, values too small or too large for any model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.source import DAMAGED_REMEDY
from hallo_numguard.files.scan.measured import (
    WEIGHTS,
    ZERO_INITIALISED,
    MeasuredTensor,
    Tensors,
    error,
    families,
    warning,
)

_RESIDUAL = re.compile(  # layers that often begin with zeros, so that a block does nothing at first
    r"(^|\.)(c_proj|o_proj|out_proj|proj_out|proj|to_out|down_proj|fc2|w2|wo|conv2|conv3|conv_out|out|up|final\w*|linear_2|up_proj"
    r"|head\w*|classifier|decoder_pred|predictor|router|time_decay|relative_position_bias_table)"
    r"(\.\d+)*\.\w+$|(table|token|tokens|query|queries|embeddings?|embed|prompt|scale|shift)$",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r"(weight|kernel|[._]w\d?)$")
_FACTOR = re.compile(r"(lora_(A|B|E|up|down|embedding_A|embedding_B)|hada_w[12](_[ab])?|lokr_w[12](_[ab])?)(?=\.|$)")
_MASK = re.compile(r"mask|causal|inv_freq|position|bias", re.IGNORECASE)
_MIN_NUMEL = 4096  # a smaller piece of a weight can be zeros
_MIN_FAMILY = 4  # layers, for a rule about what most of them hold
_ABSURD = 1e8  # no trained matrix holds larger values
_ABSURD_VECTOR = 1e12  # nor a vector: variances can be large
_SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-30, torch.bfloat16: 1e-30, torch.float16: 6e-5}
_MAX_NAMES = 5  # in a message
_IDLE_REMEDY = "They were not trained: check that their parameters are in the optimizer, and in the forward pass."
_EMPTY_REMEDY = (
    "Save it again from the whole weights: with ZeRO-3, stage3_gather_16bit_weights_on_model_save or zero_to_fp32.py."
)
_MEMORY_REMEDY = "It was most likely never written, or read from other memory. Load an intact copy, or initialise it."


def check(tensors: Tensors) -> Iterator[Finding]:
    """Yields the findings of all these rules."""
    yield from empty(tensors)
    yield from empty_moments(tensors)
    yield from all_zero(tensors)
    yield from absurd(tensors)
    yield from constant(tensors)


def empty(tensors: Tensors) -> Iterator[Finding]:
    """Weights of no elements: what ZeRO-3 leaves in the place of a weight that it has spread over the ranks."""
    weights = [tensor for tensor in tensors if tensor.entry.role in WEIGHTS]
    filled = {tensor.family[:2] for tensor in weights if tensor.entry.numel}
    holes = [tensor for tensor in weights if tensor.entry.numel == 0]
    is_most = 2 * len(holes) > len(weights) and len(holes) > 1
    lost = [one for one in holes if is_most or one.family[:2] in filled or _is_placeholder(one)]
    if lost:
        names = ", ".join(tensor.entry.name for tensor in lost[:_MAX_NAMES])
        more = f" and {len(lost) - _MAX_NAMES} more" if len(lost) > _MAX_NAMES else ""
        message = f"{len(lost)} of {len(weights)} weights have no elements, placeholders as of ZeRO-3: {names}{more}"
        yield error("no_values", lost[0].entry, message, _EMPTY_REMEDY)


def _is_placeholder(tensor: MeasuredTensor) -> bool:
    return tensor.entry.shape == (0,) and tensor.entry.name.endswith(".weight")


def empty_moments(tensors: Tensors) -> Iterator[Finding]:
    """Moments of no elements, all of them: the optimizer's state was saved while it was spread over the ranks."""
    moments = [tensor.entry for tensor in tensors if tensor.entry.role in ("exp_avg", "exp_avg_sq", "momentum")]
    if moments and not any(entry.numel for entry in moments):
        yield error("no_values", moments[0], f"all {len(moments)} moments of the optimizer have no elements")


def all_zero(tensors: Tensors) -> Iterator[Finding]:
    """Weight matrices that are all zeros, unless a layer of their kind begins so."""
    for family in families(tensor for tensor in tensors if tensor.is_matrix).values():
        zeros = [tensor for tensor in family if tensor.is_zero and not _is_small_piece(tensor)]
        if not zeros or ZERO_INITIALISED.search(zeros[0].entry.name):
            continue
        is_weight = zeros[0].entry.role == "fp32" or _WEIGHT.search(zeros[0].entry.name) is not None
        if len(zeros) == len(family) and (not is_weight or _RESIDUAL.search(zeros[0].entry.name)):
            continue
        if len(zeros) == len(family) > 1:
            entry = zeros[0].entry
            message = f"{entry.role} {entry.name} and the same weight in all {len(family)} layers are all zeros"
            yield warning("all_zero", entry, message)
            continue
        for entry in (tensor.entry for tensor in zeros):
            yield warning("all_zero", entry, f"{entry.role} {entry.name} is all zeros ({entry.numel} values)")


def _is_small_piece(tensor: MeasuredTensor) -> bool:
    return tensor.entry.whole is not None and tensor.entry.numel < _MIN_NUMEL


def absurd(tensors: Tensors) -> Iterator[Finding]:
    """Finite values that no training makes: memory that was never written, or read as another type."""
    for tensor in tensors:
        entry, largest = tensor.entry, tensor.record.absmax
        if entry.role not in WEIGHTS or tensor.is_scale or tensor.is_constant or _MASK.search(entry.name):
            continue
        what = f"{entry.role} {entry.name} holds values up to {largest:.3g}"
        if largest > (_ABSURD if tensor.is_matrix else _ABSURD_VECTOR):
            yield error("absurd_values", entry, f"{what}, which no trained weight does", _MEMORY_REMEDY)
        elif tensor.is_matrix and 0 < largest < _SMALLEST.get(entry.dtype, 0.0) and not _may_be_tiny(tensor):
            subnormal = ", all of them subnormal" if largest < torch.finfo(entry.dtype).smallest_normal else ""
            yield error("absurd_values", entry, f"{what} only{subnormal}: these are no weights", _MEMORY_REMEDY)


def _may_be_tiny(tensor: MeasuredTensor) -> bool:
    """Whether float16 weights are so small because they have just begun to move from zero."""
    name = tensor.entry.name
    begins_with_zeros = ZERO_INITIALISED.search(name) is not None or _RESIDUAL.search(name) is not None
    return tensor.entry.dtype == torch.float16 and (begins_with_zeros or tensor.entry.numel < _MIN_NUMEL)


def constant(tensors: Tensors) -> Iterator[Finding]:
    """Matrices of one value, where the same weight of nearly all other layers is none."""
    for family in families(tensor for tensor in tensors if tensor.is_matrix and tensor.entry.numel > 1).values():
        flat = [tensor for tensor in family if tensor.is_constant and not tensor.is_zero and tensor.record.absmax > 0]
        if len(family) >= _MIN_FAMILY and flat and 4 * len(flat) <= len(family):
            for entry, value in ((tensor.entry, tensor.record.absmax) for tensor in flat):
                message = (
                    f"all values of {entry.role} {entry.name} are {value:.4g} in magnitude, in other layers they vary"
                )
                yield warning("constant", entry, message, DAMAGED_REMEDY)


def adapters(tensors: Tensors) -> Iterator[Finding]:
    """Adapters that add nothing, because one factor of each is zero, as it begins."""
    factors: dict[str, list[MeasuredTensor]] = {}
    for tensor in tensors:
        match = _FACTOR.search(tensor.entry.name)
        if match is not None and tensor.entry.role == "parameter" and tensor.entry.numel:
            factors.setdefault(match[1], []).append(tensor)
    yield from _idle_targets(factors)
    for same in factors.values():
        if all(tensor.is_zero for tensor in same):
            entry = same[0].entry
            what = f"all {len(same)} tensors like {entry.name} are zero: the adapter adds nothing, as at the beginning"
            message, file = f"{entry.file.name}: {what}", str(entry.file)
            yield Finding("zero_adapter", message, name=entry.name, severity="info", file=file)
            return


def _idle_targets(factors: Mapping[str, Sequence[MeasuredTensor]]) -> Iterator[Finding]:
    """Target modules whose adapters add nothing in any layer, while those of other modules do."""
    for same in factors.values():
        groups = list(families(same).values())
        idle = [group for group in groups if all(tensor.is_zero for tensor in group)]
        if idle and len(idle) < len(groups):
            entry = idle[0][0].entry
            message = f"all {len(idle[0])} tensors like {entry.name} are zero, and those of other modules are not"
            yield warning("zero_adapter", entry, message, _IDLE_REMEDY)
