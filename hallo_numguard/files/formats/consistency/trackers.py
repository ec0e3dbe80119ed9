"""Files that name the newest checkpoint, or the step of one, against the folders beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.consistency.sidecar_json import document, document_or_empty
from hallo_numguard.files.formats.file_access import read_small
from hallo_numguard.files.formats.source import DamagedFile

_STATE = "trainer_state.json"
_MEGATRON = "latest_checkpointed_iteration.txt"
_TRACKERS = ("latest_checkpoint", "latest_checkpoint.txt", "last_checkpoint", "last_checkpoint.txt", "latest.txt")
FILES = frozenset({*_TRACKERS, _MEGATRON, _STATE, "checkpoint"})
_TENSORFLOW = re.compile(r'^model_checkpoint_path: "(?P<name>[^"]+)"', re.MULTILINE)
_ITERATION = re.compile(r"iter_(\d+)$")
_STEP = re.compile(r"^(checkpoint|step|global_step|epoch|iter)[-_=]?(\d+)$")
_MAX_BYTES = 1 << 16
_REMEDY = "Write the name of the newest complete checkpoint into it."
_STATE_REMEDY = "Resume from another checkpoint: step, learning rate and order of the data would be those of that one."


def facts(contents: Contents) -> dict[str, Any]:
    """Returns how many steps the run had made, as far as the folder says so."""
    steps = document_or_empty(contents.folder / _STATE).get("global_step")
    return {"trainer_steps": steps} if type(steps) is int else {}


def check(contents: Contents) -> Iterator[Finding]:
    """Checks what names a checkpoint or a step."""
    yield from _megatron(contents)
    for name in sorted(contents.files & {*_TRACKERS, "checkpoint"}):
        yield from _named(contents, name)
    if _STATE in contents.files:
        yield from _trainer_state(contents)
    unfinished = sorted(name for name in contents.folders if name.startswith(("tmp-checkpoint", "tmp_checkpoint")))
    if unfinished:
        message = f"{unfinished[0]} was never finished: the run ended while it was written"
        yield contents.finding("unfinished", message, unfinished[0], "info", "Delete it.")


def _megatron(contents: Contents) -> Iterator[Finding]:
    if _MEGATRON not in contents.files:
        return
    text = _text(contents, _MEGATRON)
    if text.isascii() and text.isdigit() and len(text) < 12:
        number = int(text)
        there = {int(match[1]): name for name in contents.folders if (match := _ITERATION.search(name))}
        if number in there:
            yield from _fewer_ranks(contents, there[number], set(there.values()))
            return
        wanted = f"iter_{number:07d}"
        newest = f"; the newest here is {there[max(there)]}" if there else ""
        message = f"{_MEGATRON} names {wanted}, which is not there{newest}"
    elif text == "release":
        if "release" in contents.folders:
            return
        message = f"{_MEGATRON} names release, which is not there"
    else:
        message = f"{_MEGATRON} names no iteration: {text[:40]!r}"
    yield contents.finding("missing", message, _MEGATRON, remedy=_REMEDY)


def _fewer_ranks(contents: Contents, name: str, others: set[str]) -> Iterator[Finding]:
    """The newest checkpoint with fewer folders of ranks than an earlier one."""
    counts = {other: len(list((contents.folder / other).glob("mp_rank_*"))) for other in others}
    most = max(counts, key=lambda other: counts[other])
    if counts[name] < counts[most]:
        message = f"{name} has {counts[name]} folders mp_rank_*, and {most} has {counts[most]}"
        remedy = "Copy the folders of all ranks, or go back to the earlier checkpoint."
        yield contents.finding("missing_shard", message, name, remedy=remedy)


def _named(contents: Contents, tracker: str) -> Iterator[Finding]:
    """A text with the name of a checkpoint, of TensorFlow's kind or that name alone."""
    text = _text(contents, tracker)
    match = _TENSORFLOW.search(text)
    if match is None and (tracker == "checkpoint" or not text or len(text.splitlines()) != 1 or len(text) > 4096):
        return
    name = PurePosixPath(text if match is None else match["name"]).name
    everything = contents.files | contents.folders
    if name and name not in everything and f"{name}.index" not in everything and not Path(text).exists():
        message = f"{tracker} names {name}, which is not there"
        yield contents.finding("missing", message, tracker, remedy=_REMEDY)


def _trainer_state(contents: Contents) -> Iterator[Finding]:
    try:
        state = document(contents.folder / _STATE)
    except DamagedFile as error:
        yield error.finding(contents.folder / _STATE)
        return
    step, match = state.get("global_step"), _STEP.match(contents.folder.resolve().name)
    is_counted = match is not None and match[1] in ("checkpoint", "step", "global_step") and type(step) is int
    if match is not None and is_counted and step != int(match[2]):
        message = f"{_STATE} says that {step} steps were made, and the folder is called {match[0]}"
        yield contents.finding("trainer_state", message, _STATE, remedy=_STATE_REMEDY)
    yield from _logged(contents, state)


def _logged(contents: Contents, state: Mapping[str, Any]) -> Iterator[Finding]:
    """The last loss that the run logged before it saved."""
    history = state.get("log_history")
    entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
    losses = [(entry.get("step"), entry["loss"]) for entry in entries if isinstance(entry.get("loss"), float)]
    if losses and not math.isfinite(losses[-1][1]):
        message = f"{_STATE}: the last loss that was logged is {losses[-1][1]} (step {losses[-1][0]})"
        yield contents.finding("trainer_state", message, _STATE, "warning", "Resume from an earlier checkpoint.")


def _text(contents: Contents, name: str) -> str:
    try:
        return read_small(contents.folder / name, _MAX_BYTES).decode("utf-8", "replace").strip()
    except DamagedFile:
        return ""
