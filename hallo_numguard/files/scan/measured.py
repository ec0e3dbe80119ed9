"""Tensors with the statistics of their values, as the rules see them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Record
from hallo_numguard.files.formats.source import DAMAGED_REMEDY, TensorEntry
from hallo_numguard.files.scan.reading import ScannedFile

WEIGHTS = ("parameter", "fp32")  # roles of the values that a model computes with
NUMBER = re.compile(r"\d+")
SCALE = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_2|absmax|zero_points?|qzeros|quant_map|global_scale|amax|qstate|g_idx)$"
)
ZERO_INITIALISED = re.compile(
    r"bias|lora_|hada_|lokr_|vera_|adapter|controlnet|zero|gamma|alpha|gate|modulation|adaln|grn|temporal|motion|ip_adapter",
    re.IGNORECASE,
)
_STATE_REMEDY = "Go back to an earlier checkpoint: the optimizer would write it into the weights."

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
        return entry.file.parent, NUMBER.sub("*", entry.name), entry.whole_shape, entry.role

    @property
    def is_scale(self) -> bool:
        """Whether it scales quantized weights."""
        return self.entry.dtype == torch.float8_e8m0fnu or SCALE.search(self.entry.name) is not None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight with two or more dimensions longer than 1."""
        shape = self.entry.whole_shape
        return self.entry.role in WEIGHTS and sum(size > 1 for size in shape) >= 2 and not self.is_scale

    @property
    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return self.entry.numel > 0 and self.record.absmax == 0 and self.record.nonfinite == 0

    @property
    def is_constant(self) -> bool:
        """Whether all values have the same magnitude: only then is the sum of squares as large as it can be."""
        return self.record.sumsq >= self.record.absmax * self.record.absmax * self.entry.numel * (1 - 1e-5)


Tensors = Sequence[MeasuredTensor]


def measured(files: Iterable[ScannedFile]) -> list[MeasuredTensor]:
    """Returns the tensors of files that have statistics."""
    found = (tensor for file in files for tensor in file.tensors)
    return [MeasuredTensor(tensor.entry, tensor.record) for tensor in found if tensor.record is not None]


def families(tensors: Iterable[MeasuredTensor]) -> dict[Family, list[MeasuredTensor]]:
    """Returns the tensors by family."""
    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.family].append(tensor)
    return found


def warning(kind: str, entry: TensorEntry, message: str, remedy: str = DAMAGED_REMEDY) -> Finding:
    """Returns a warning about a tensor."""
    return Finding(kind, f"{entry.file.name}: {message}", name=entry.name, file=str(entry.file), remedy=remedy)


def error(kind: str, entry: TensorEntry, message: str, remedy: str = "") -> Finding:
    """Returns an error about a tensor."""
    return replace(warning(kind, entry, message, remedy or remedy_for(entry)), severity="error")


def remedy_for(entry: TensorEntry) -> str:
    """Returns what to do about damage to a tensor."""
    return DAMAGED_REMEDY if entry.role in ("parameter", "buffer") else _STATE_REMEDY
