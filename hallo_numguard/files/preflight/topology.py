"""Number of processes, stage of ZeRO and precision: those of the run to come against those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source
from hallo_numguard.files.preflight.run_spec import Plan

_UNIVERSAL = "convert it with DeepSpeed's ds_to_universal.py and set checkpoint.load_universal"
_PLACES = {
    "dp_world_size": "the files of the weights say {}",
    "partition_count": "those of the optimizer say {}",
    "optimizer_files": "{} files of the optimizer are there",
}


def check(source: Source, plan: Plan) -> list[Finding]:
    """Returns where a checkpoint does not fit the run."""
    if not source.layout.startswith("deepspeed"):
        return []
    return [*_places_agree(source), *_world_size(source, plan), *_stage(source, plan), *_precision(source, plan)]


def data_parallel_size(source: Source) -> int | None:
    """Returns the number of data-parallel ranks that wrote a checkpoint, as it says itself."""
    for place in _PLACES:
        number = source.metadata.get(place)
        if type(number) is int and number > 0:
            return number
    return None


def _places_agree(source: Source) -> Iterator[Finding]:
    if source.metadata.get("zero_stage") == 0:
        return
    told = {place: source.metadata.get(place) for place in _PLACES}
    known = {place: number for place, number in told.items() if type(number) is int}
    parallel = _model_parallel_size(source)
    if "optimizer_files" in known:
        known["optimizer_files"] //= parallel
    if len(set(known.values())) > 1:
        words = ", ".join(_PLACES[place].format(number) for place, number in known.items())
        yield Finding(
            "world_size",
            f"{source.root.name} does not say with one voice how many ranks wrote it: {words}",
            severity="error",
            file=str(source.root),
            remedy="Files of several checkpoints were mixed, or some are missing: copy the whole folder again.",
        )


def _world_size(source: Source, plan: Plan) -> Iterator[Finding]:
    saved = data_parallel_size(source)
    if saved is None or plan.world_size is None:
        return
    parallel = _model_parallel_size(source)
    if plan.world_size == saved * parallel:
        return
    if source.metadata.get("zero_stage") == 0:
        message = f"{source.root.name} was written by {saved} data-parallel ranks, and the run has {plan.world_size}"
        yield Finding("world_size", f"{message}: stage 0 does not mind", severity="info", file=str(source.root))
        return
    yield Finding(
        "world_size",
        f"{source.root.name} was written by {saved * parallel} processes (ZeRO stage "
        f"{source.metadata.get('zero_stage')}), and the run has {plan.world_size}",
        severity="error",
        file=str(source.root),
        remedy=f"Start with {saved * parallel} processes, or {_UNIVERSAL}.",
    )


def _stage(source: Source, plan: Plan) -> Iterator[Finding]:
    saved, wanted = source.metadata.get("zero_stage"), plan.stage
    if saved is None or wanted is None or saved == wanted:
        return
    yield Finding(
        "zero_stage",
        f"{source.root.name} was written with ZeRO stage {saved}, and the run has stage {wanted}",
        severity="error",
        file=str(source.root),
        remedy=f"Set zero_optimization.stage to {saved}, or {_UNIVERSAL}.",
    )


def _precision(source: Source, plan: Plan) -> Iterator[Finding]:
    saved: Any = source.metadata.get("dtype")
    wanted = plan.precision
    if not isinstance(saved, str) or wanted is None or saved.removeprefix("torch.") == wanted.removeprefix("torch."):
        return
    yield Finding(
        "dtype",
        f"{source.root.name} was trained in {saved}, and the run is in {wanted}",
        file=str(source.root),
        remedy="Train in the same dtype, or load weights only: the optimizer's state is of another kind.",
    )


def _model_parallel_size(source: Source) -> int:
    size = source.metadata.get("mp_world_size")
    return size if type(size) is int and size > 0 else 1
