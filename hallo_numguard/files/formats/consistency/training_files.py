"""Files that a checkpoint of the HF Trainer or of Accelerate should have, and numbers of optimizers and schedulers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.file_access import file_size
from hallo_numguard.files.formats.source import Source

_EMPTY = frozenset({".bin", ".ckpt", ".distcp", ".json", ".pkl", ".pt", ".pth", ".safetensors"})
_OPTIMIZER = re.compile(
    r"^optimizer(_\d+)?\.(bin|pt)$|^optimizer(_\d+)?$|^global_step\d+$|^pytorch_model$|_optim_states\.pt$"
)
_SCHEDULER = re.compile(r"^scheduler(_\d+)?\.(bin|pt)$")
_RANDOM = re.compile(r"^rng_state(_(?P<rank>\d+))?\.pth$|^random_states_(?P<number>\d+)\.pkl$")
_MODEL = re.compile(r"^(model|pytorch_model|adapter_model|adapter_config|diffusion_pytorch_model)|^global_step\d+$")
_CHECKPOINT = re.compile(r"^checkpoint[-_]\d+$")
_MISSING_REMEDY = "Resume from another checkpoint; what is missing would begin as in a new run."
_MIN_SCALE = 1.0  # of a loss scale; below, losses were scaled down again and again
_NUMBERS = ("lr", "eps", "weight_decay", "momentum")


def check(contents: Contents) -> Iterator[Finding]:
    """Checks which files of a training run are there, and the numbers in them."""
    yield from _of_no_bytes(contents)
    yield from _missing(contents)
    yield from _random_states(contents)
    for part in contents.parts:
        yield from numbers(part)


def _of_no_bytes(contents: Contents) -> Iterator[Finding]:
    known = {part.root.name for part in contents.parts if part.findings}
    known |= {Path(finding.file).name for part in contents.parts for finding in part.findings}
    for name in sorted(contents.files - known):
        path = contents.folder / name
        if path.suffix in _EMPTY and path.is_file() and file_size(path) == 0:
            yield contents.finding("damaged_file", f"{name}: is empty (0 bytes)", name, remedy=_MISSING_REMEDY)


def _missing(contents: Contents) -> Iterator[Finding]:
    """Files that belong to those that are there."""
    everything = contents.files | contents.folders
    has = {
        "the optimizer's state": any(map(_OPTIMIZER.search, everything)),
        "the state of the random number generators": any(map(_RANDOM.search, everything)),
        "trainer_state.json": "trainer_state.json" in everything,
        "the scheduler's state": any(map(_SCHEDULER.search, everything)),
    }
    optimizer, random, trainer, scheduler = has.values()
    is_trainer = trainer or _is_of_trainer(contents)
    is_full = optimizer + random + scheduler >= 2 and (is_trainer or random or scheduler)
    if not is_full:
        return
    expected = {"the optimizer's state", "the state of the random number generators"}
    if is_trainer and any(name.startswith("rng_state") or name == "optimizer.pt" for name in everything):
        expected |= {"trainer_state.json", "the scheduler's state"}
    for what in (what for what, is_there in has.items() if what in expected and not is_there):
        yield contents.finding(
            "missing", f"{what} is missing, and what is saved with it is there", remedy=_MISSING_REMEDY
        )
    if not any(map(_MODEL.search, everything)):
        yield contents.finding("missing", "the model's weights are missing, and what is saved with them is there")
    yield from _unlike_siblings(contents)


def _is_of_trainer(contents: Contents) -> bool:
    """Whether the names are those that the HF Trainer gives its files."""
    is_named_so = _CHECKPOINT.match(contents.folder.resolve().name) is not None
    has_states = any(name.startswith("rng_state") for name in contents.files)
    return is_named_so or (has_states and bool(contents.files & {"optimizer.pt", "scheduler.pt"}))


def _unlike_siblings(contents: Contents) -> Iterator[Finding]:
    """A scheduler or loss scaler that the other checkpoints in the folder above have."""
    real = contents.folder.resolve()
    try:
        folders = [folder for folder in real.parent.iterdir() if folder.is_dir() and folder.name != real.name]
    except OSError:
        return
    own = {name for name in contents.files if _OPTIMIZER.search(name) or _RANDOM.search(name)}
    alike = [folder for folder in folders if _has_all(folder, own)]
    for lost, effect in (("scheduler.bin", "the learning rate"), ("scaler.pt", "the loss scale")):
        having = [folder for folder in alike if (folder / lost).exists()]
        if lost not in contents.files and having and 2 * len(having) > len(alike):
            message = f"{lost} is missing, and {having[0].name} beside it has one: {effect} begins anew"
            yield contents.finding("missing", message, severity="warning", remedy=_MISSING_REMEDY)


def _has_all(folder: Path, names: set[str]) -> bool:
    return bool(names) and all((folder / name).exists() for name in names)


def _random_states(contents: Contents) -> Iterator[Finding]:
    """Ranks whose state of the random number generators is missing."""
    ranks = set()
    for name in contents.files:
        match = _RANDOM.match(name)
        number = match and (match["rank"] or match["number"])
        if number:
            ranks.add(int(number))
    lost = sorted(set(range(max(ranks, default=-1) + 1)) - ranks)
    if lost:
        message = f"the random states of rank {', '.join(map(str, lost[:5]))} are missing, and others are there"
        yield contents.finding("missing_shard", message, remedy=_MISSING_REMEDY)


def numbers(part: Source) -> Iterator[Finding]:
    """Yields findings on learning rates and loss scales in a file that cannot be meant."""
    file = str(part.root)

    def finding(message: str, severity: str = "error") -> Finding:
        remedy = "Go back to an earlier checkpoint, or set it after loading."
        return Finding("training_state", f"{part.root.name}: {message}", severity=severity, file=file, remedy=remedy)

    for where, group in _groups(part):
        for key in _NUMBERS:
            value = group.get(key)
            if isinstance(value, float) and (not math.isfinite(value) or (key == "lr" and value < 0)):
                yield finding(f"{key} of {where} is {value}")
    for scheduler in part.metadata.get("schedulers") or ():
        rates = scheduler.get("_last_lr")
        rates = [rate for rate in rates if isinstance(rate, float)] if isinstance(rates, list) else []
        if any(not math.isfinite(rate) for rate in rates):
            yield finding(f"the learning rate in the scheduler is {rates[0]}")
    for scaler in part.metadata.get("scalers") or ():
        scale = scaler.get("scale")
        if not isinstance(scale, (int, float)):
            continue
        if scale <= 0 or (isinstance(scale, float) and not math.isfinite(scale)):
            yield finding(f"the loss scale is {scale}")
        elif scale < _MIN_SCALE:
            yield finding(f"the loss scale is {scale:.3g}: every step before it overflowed", "warning")


def _groups(part: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for optimizer in part.metadata.get("optimizers") or ():
        for number, group in enumerate(optimizer["groups"]):
            yield f"group {number} of the optimizer", group
