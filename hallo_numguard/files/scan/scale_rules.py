"""Rules for quantized weights: missing, zero or negative scales, saturated values, and scales in GGUF blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.gguf_file import BLOCKS
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, load
from hallo_numguard.files.scan.measured import MeasuredTensor, error, measured, warning
from hallo_numguard.files.scan.reading import ScannedFile

_FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.float8_e4m3fnuz: 240.0}  # and the largest value
_SCALE_OF = re.compile(r"(?P<weight>.*?)[._](?P<end>scales?|scale_inv|weight_scale|weight_scale_inv|absmax)$")
_PACKED_END = re.compile(r"([._](weight|qweight|weight_packed|packed|blocks|int_repr))$")
_MAX_SATURATED = 0.05  # share of values at the largest one; a block's own scale puts one value there
_MAX_LOST = 0.6  # share of zeros among values that were not zero before
_SAMPLE = 1 << 16  # values of a tensor
_SCALED_SHARE = 0.9  # of fp8 matrices that reach the largest value: they were scaled to
_MAX_NAMES = 5  # in a message
_REMEDY = "Quantize the model again, or load an intact copy: without its scale a weight is off by orders of magnitude."


def check(source: Source, files: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Yields findings on the quantized weights of a model.

    Args:
        source: The model, whose metadata may have its "quantization".
        files: Its files as they were read.
    """
    tensors = measured(files)
    matrices = [tensor for tensor in tensors if tensor.entry.dtype in _FP8 and tensor.is_matrix]
    if matrices:
        yield from _missing(source, matrices, {tensor.entry.name for tensor in tensors})
        yield from _saturated(matrices)
    yield from _bad_scales(tensors, _quantized(files))
    yield from _blocks(tensor.entry for file in files for tensor in file.tensors)


def _missing(source: Source, matrices: Sequence[MeasuredTensor], names: set[str]) -> Iterator[Finding]:
    """fp8 weights without a scale, where others have one, or where they can only have been scaled."""
    unscaled = [tensor for tensor in matrices if not _has_scale(tensor.entry.name, names)]
    if not unscaled:
        return
    reach = sum(tensor.record.absmax >= _FP8[tensor.entry.dtype] for tensor in matrices)
    is_scaled = source.metadata.get("quantization") in ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
    if len(unscaled) == len(matrices) and not (
        is_scaled or (reach > _SCALED_SHARE * len(matrices) and len(matrices) > 1)
    ):
        return
    listed = ", ".join(tensor.entry.name for tensor in unscaled[:_MAX_NAMES])
    more = f" and {len(unscaled) - _MAX_NAMES} more" if len(unscaled) > _MAX_NAMES else ""
    message = f"{len(unscaled)} of {len(matrices)} fp8 weights have no scale: {listed}{more}"
    yield error("missing_scale", unscaled[0].entry, message, _REMEDY)


def _has_scale(weight: str, names: set[str]) -> bool:
    base = weight.removesuffix(".weight")
    ends = (
        "_scale_inv",
        "_scale",
        ".scale",
        "_scales",
        ".scales",
        ".weight_scale",
        ".scale_weight",
        "_absmax",
        ".absmax",
    )
    return any(f"{stem}{end}" in names for stem in {weight, base} for end in ends)


def _saturated(matrices: Sequence[MeasuredTensor]) -> Iterator[Finding]:
    """fp8 weights in which many values were cut at the largest one, or lost as zeros."""
    shares = [(tensor, _shares(tensor.entry)) for tensor in matrices]
    for place, words, limit in ((0, "are cut at the largest value", _MAX_SATURATED), (1, "are zero", _MAX_LOST)):
        bad = [(tensor.entry, share[place]) for tensor, share in shares if share[place] > limit]
        if bad and not all(tensor.is_zero for tensor in matrices):
            entry, share = max(bad, key=lambda item: item[1])
            message = (
                f"{share:.0%} of the values of {entry.name} {words} (as in {len(bad)} of {len(matrices)} fp8 weights)"
            )
            yield warning("fp8_range", entry, message, "Quantize it again with a scale that fits its values.")


def _shares(entry: TensorEntry) -> tuple[float, float]:
    """Shares of values at the largest number of the format, and of zeros, in the first ones."""
    try:
        sample = load(entry).flatten()[:_SAMPLE].float().abs()
    except (DamagedFile, OSError):
        return 0.0, 0.0
    if not sample.numel():
        return 0.0, 0.0
    return float((sample >= _FP8[entry.dtype]).float().mean()), float((sample == 0).float().mean())


def _quantized(files: Sequence[ScannedFile]) -> set[str]:
    """Names of quantized weights, without their last part."""
    names = (tensor.entry.name for file in files for tensor in file.tensors if _is_packed(tensor.entry))
    return {_PACKED_END.sub("", name) for name in names}


def _is_packed(entry: TensorEntry) -> bool:
    is_float = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
    return not is_float and entry.dtype != torch.float8_e8m0fnu and _SCALE_OF.match(entry.name) is None


def _scales_any(name: str, quantized: set[str]) -> bool:
    match = _SCALE_OF.match(name)
    return match is not None and _PACKED_END.sub("", match["weight"]) in quantized


def _bad_scales(tensors: Sequence[MeasuredTensor], quantized: set[str]) -> Iterator[Finding]:
    """Scales that are zero or negative, where those of other weights are not."""
    scales = [tensor for tensor in tensors if tensor.is_scale and _scales_any(tensor.entry.name, quantized)]
    counts: Counter[str] = Counter()
    worst: dict[str, tuple[TensorEntry, int]] = {}
    for entry in (tensor.entry for tensor in scales):
        for words, count in _bad_values(entry).items():
            counts[words] += 1
            worst.setdefault(words, (entry, count))
    for words, number in counts.items():
        if 2 * number <= len(scales) or number == 1 or words == "zero":
            entry, count = worst[words]
            more = f", and in {number - 1} more" if number > 1 else ""
            message = f"{count} of {entry.numel} scales in {entry.name} are {words}{more}"
            yield error("bad_scale", entry, message, _REMEDY)


def _bad_values(entry: TensorEntry) -> Mapping[str, int]:
    try:
        values = load(entry).flatten()
    except (DamagedFile, OSError):
        return {}
    if entry.dtype == torch.float8_e8m0fnu:  # has neither
        return {}
    numbers = values.float()
    found = {"zero": int((numbers == 0).sum()), "negative": int((numbers < 0).sum())}
    return {words: count for words, count in found.items() if count}


def _blocks(entries: Iterator[TensorEntry]) -> Iterator[Finding]:
    """Scales in the blocks of GGUF that are not finite."""
    for entry in entries:
        if not entry.role.startswith("blocks "):
            continue
        _, size, places = BLOCKS[int(entry.role.removeprefix("blocks "))]
        try:
            blocks = load(entry)
        except (DamagedFile, OSError):
            continue
        scales = [blocks[:, place : place + 2].contiguous().view(torch.float16) for place in places]
        bad = sum(int((~scale.isfinite()).sum()) for scale in scales)
        if bad:
            message = f"{bad} of {entry.numel // size} blocks of {entry.name} have a scale that is NaN or infinite"
            yield error("nonfinite", entry, message)
        elif not blocks.any():
            yield warning("all_zero", entry, f"{entry.name} is all zeros ({entry.nbytes} bytes)")
