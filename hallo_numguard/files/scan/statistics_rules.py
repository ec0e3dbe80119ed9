"""Rules for the running statistics of normalisation layers: negative variances, and statistics that never moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.source import DamagedFile, TensorEntry, load
from hallo_numguard.files.scan.measured import error, warning
from hallo_numguard.files.scan.reading import ScannedFile

_NAMES = ("running_mean", "running_var", "num_batches_tracked")
_MAX_NUMEL = 1 << 20


def check(files: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Yields findings on running statistics."""
    layers: dict[tuple[Path, str], dict[str, TensorEntry]] = {}
    for entry in (tensor.entry for file in files for tensor in file.tensors):
        module, _, last = entry.name.rpartition(".")
        is_plain = entry.dtype.itemsize > 1 and not entry.dtype.is_complex and 0 < entry.numel <= _MAX_NUMEL
        if last in _NAMES and is_plain and entry.role in ("parameter", "buffer"):
            layers.setdefault((entry.file, module), {})[last] = entry
    frozen = []
    for held in layers.values():
        try:
            yield from _negative(held.get("running_var"))
            frozen += [held["running_var"]] if len(held) == len(_NAMES) and _never_moved(held) else []
        except (DamagedFile, OSError):
            continue  # the scan reports it
    if frozen:
        entry = frozen[0]
        message = (
            f"{entry.name} and the mean beside it are as in a new model, and batches were counted "
            f"({len(frozen)} of {len(layers)} layers): they were not updated, or not saved"
        )
        yield warning("running_statistics", entry, message, "Evaluate with these layers in training mode, or train on.")


def _negative(entry: TensorEntry | None) -> Iterator[Finding]:
    if entry is None:
        return
    count = int((load(entry) < 0).sum())
    if count:
        message = f"{count} of {entry.numel} values of {entry.name} are negative, which no variance is"
        yield error("running_statistics", entry, message, "The layer makes NaN of them: load an intact copy.")


def _never_moved(held: dict[str, TensorEntry]) -> bool:
    mean, variance, batches = (load(held[name]) for name in _NAMES)
    return bool(batches.sum() > 0) and not mean.any() and bool((variance == 1).all())
