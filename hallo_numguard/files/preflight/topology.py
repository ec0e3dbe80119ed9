"""Number of processes, ZeRO stage and precision of the run against those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source
from hallo_numguard.files.preflight.run_spec import RunSpec

_UNIVERSAL = "convert it with DeepSpeed's ds_to_universal.py and set checkpoint.load_universal"
_RANK_COUNTS = {  # metadata that should agree on the number of ranks, with a text for messages
    "dp_world_size": "files with weights say {}",
    "partition_count": "files with optimizer state say {}",
    "optimizer_files": "{} files with optimizer state exist",
}


def check(source: Source, spec: RunSpec) -> list[Finding]:
    """Checks whether a checkpoint fits the run."""
    if not source.layout.startswith("deepspeed"):
        return []
    return [*_rank_counts(source), *_world_size(source, spec), *_stage(source, spec), *_precision(source, spec)]


def _data_parallel_size(source: Source) -> int | None:
    """Number of data-parallel ranks that wrote a checkpoint, if known."""
    counts = (source.metadata.get(key) for key in _RANK_COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), None)


def _rank_counts(source: Source) -> Iterator[Finding]:
    if source.metadata.get("zero_stage") == 0:
        return
    counts = {key: source.metadata.get(key) for key in _RANK_COUNTS}
    known = {key: count for key, count in counts.items() if type(count) is int}
    if "optimizer_files" in known:
        known["optimizer_files"] //= _model_parallel_size(source)
    if len(set(known.values())) > 1:
        words = ", ".join(_RANK_COUNTS[key].format(count) for key, count in known.items())
        yield Finding(
            "world_size",
            f"{source.root.name} contradicts itself about how many ranks wrote it: {words}",
            severity="error",
            file=str(source.root),
            remedy="Files of several checkpoints were mixed, or some are missing: copy the whole folder again.",
        )


def _world_size(source: Source, spec: RunSpec) -> Iterator[Finding]:
    saved, stage, file = _data_parallel_size(source), source.metadata.get("zero_stage"), str(source.root)
    if saved is None:
        return
    processes = saved * _model_parallel_size(source)
    ranks = f"{source.root.name} was written by {saved} data-parallel ranks"
    if spec.world_size is None and stage != 0:
        yield Finding("world_size", f"{ranks}; the number of processes was not given", severity="info", file=file)
    elif spec.world_size is None or spec.world_size == processes:
        return
    elif stage == 0:
        message = f"{ranks}, and the run has {spec.world_size}: stage 0 can be loaded by any number"
        yield Finding("world_size", message, severity="info", file=file)
    else:
        yield Finding(
            "world_size",
            f"{source.root.name} was written by {processes} processes (ZeRO stage {stage}), and the run has "
            f"{spec.world_size}",
            severity="error",
            file=file,
            remedy=f"Start with {processes} processes, or {_UNIVERSAL}.",
        )


def _stage(source: Source, spec: RunSpec) -> Iterator[Finding]:
    saved, expected = source.metadata.get("zero_stage"), spec.stage
    if saved is None or expected is None or saved == expected:
        return
    yield Finding(
        "zero_stage",
        f"{source.root.name} was written with ZeRO stage {saved}, and the run has stage {expected}",
        severity="error",
        file=str(source.root),
        remedy=f"Set zero_optimization.stage to {saved}, or {_UNIVERSAL}.",
    )


def _precision(source: Source, spec: RunSpec) -> Iterator[Finding]:
    saved: Any = source.metadata.get("dtype")
    expected = spec.precision
    if (
        not isinstance(saved, str)
        or expected is None
        or saved.removeprefix("torch.") == expected.removeprefix("torch.")
    ):
        return
    yield Finding(
        "dtype",
        f"{source.root.name} was trained in {saved}, and the run is in {expected}",
        file=str(source.root),
        remedy="Train in the same dtype, or load weights only: the optimizer state does not fit.",
    )


def _model_parallel_size(source: Source) -> int:
    size = source.metadata.get("mp_world_size")
    return size if type(size) is int and size > 0 else 1
