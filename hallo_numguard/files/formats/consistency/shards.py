"""Files of one model beside each other: an index and its shards, leftovers of other saves, and what a loader takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.consistency.sidecar_json import REMEDY, document
from hallo_numguard.files.formats.file_access import is_plain
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, load

_INDEX = ".index.json"
_IS_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_SHARD = re.compile(
    r"^(?P<stem>.*?)[-_.]?(?P<number>\d{2,6})-of-(?P<count>\d{2,6})(?P<rest>.*\.(safetensors|bin|pt|pth|gguf))$"
)
_WHOLE = re.compile(
    r"^(?P<stem>model|pytorch_model|adapter_model|diffusion_pytorch_model)(?P<variant>\.\w+)?\.(?P<kind>safetensors|bin)$"
)
_SAME_MODEL = {"pytorch_model": "model"}  # the name that transformers gives the same weights in safetensors
_MAX_NAMES = 5  # in a message
_MAX_SAMPLES, _MAX_SAMPLE = 16, 1 << 16  # tensors, and elements of each, to tell two files apart
_MIN_DIFFERENCE = 0.05  # relative to the largest value: beyond any rounding to 8 bits
_MIN_HELD = 0.9  # of the size that an index names; tied weights may be counted twice
_LEFT_REMEDY = "Delete the files of the other save, or save the model into an empty folder."


@dataclass(frozen=True)
class _Index:
    """An index: its file, the shard of each tensor, and the size of all if it says so."""

    name: str
    weight_map: Mapping[str, str]
    nbytes: int | None

    @property
    def shards(self) -> set[str]:
        return set(self.weight_map.values())


def check(contents: Contents) -> Iterator[Finding]:
    """Checks every index against its shards, and whether files of several saves lie beside each other."""
    indexes = []
    for name in sorted(filter(_IS_INDEX.search, contents.files)):
        try:
            indexes.append(_read(contents, name))
        except DamagedFile as error:
            yield error.finding(contents.folder / name)
    named = set().union(*(index.shards for index in indexes if index.shards & contents.files))
    for index in indexes:
        yield from _check_index(contents, index, named)
    yield from _check_names(contents, named)
    yield from _check_whole(contents, indexes)
    yield from _check_copies(contents)


def _read(contents: Contents, name: str) -> _Index:
    found = document(contents.folder / name)
    weight_map, metadata = found.get("weight_map"), found.get("metadata")
    if not isinstance(weight_map, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise DamagedFile("is damaged: it does not say which file holds which tensor", remedy=REMEDY)
    size = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return _Index(name, weight_map, int(size) if isinstance(size, (int, float)) and 0 < size < 1 << 60 else None)


def _check_index(contents: Contents, index: _Index, named: set[str]) -> Iterator[Finding]:
    """Compares the tensors in the shards with those that the index names."""
    outside = sorted(shard for shard in index.shards if not is_plain(shard))
    if outside:
        message = f"{index.name}: leads out of the folder: {_some(outside)}"
        yield contents.finding("escape", message, index.name)
        return
    missing = sorted(index.shards - contents.files)
    if len(missing) == len(index.shards) and _is_covered(contents, named):
        return  # the index of another format, or variant, whose files were not downloaded
    if missing:
        are = f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        whose = f"{index.name} says that {'it holds' if len(missing) == 1 else 'they hold'} weights"
        more = f" ({len(missing)} of {len(index.shards)} shards)" if len(missing) > 1 else ""
        yield contents.finding("missing_shard", f"{are}, and {whose}{more}", missing[0])
    complete = not missing
    for shard in sorted(index.shards & contents.files):
        part = contents.part(shard)
        if part is None or part.findings or part.unchecked:
            complete = False
            continue
        found = list(_differences(contents, shard, index, {entry.name for entry in part.entries}))
        complete &= not found
        yield from found
    if complete:
        yield from _check_size(contents, index)


def _is_covered(contents: Contents, named: set[str]) -> bool:
    """Whether weights are there, and none of them is a shard that no index names."""
    weights = [part.root.name for part in contents.parts if part.entries]
    return bool(weights) and not any(_SHARD.match(name) for name in weights if name not in named)


def _differences(contents: Contents, shard: str, index: _Index, held: set[str]) -> Iterator[Finding]:
    indexed = {tensor for tensor, file in index.weight_map.items() if file == shard}
    lost, extra = sorted(indexed - held), sorted(held - indexed)
    if lost:
        message = f"{shard} lacks {_some(lost)}, which the index says it holds"
        yield _named(contents.finding("missing_tensor", message, shard), lost[0])
    if extra:
        message = f"{shard} holds {_some(extra)}, which the index does not name{_elsewhere(index, extra)}"
        yield _named(contents.finding("extra_tensor", message, shard), extra[0])


def _elsewhere(index: _Index, names: list[str]) -> str:
    others = {index.weight_map[name] for name in names if name in index.weight_map}
    return f" there, but in {_some(sorted(others))}" if others else ""


def _check_size(contents: Contents, index: _Index) -> Iterator[Finding]:
    parts = [part for shard in index.shards if (part := contents.part(shard)) is not None]
    held = sum(entry.nbytes for part in parts for entry in part.entries)
    if index.nbytes is not None and held < _MIN_HELD * index.nbytes:
        message = f"{index.name} says that all weights take {index.nbytes} bytes, and its shards hold {held}"
        yield contents.finding("total_size", message, index.name, "warning", "Check that no weights were left out.")


def _check_names(contents: Contents, named: set[str]) -> Iterator[Finding]:
    """Shards that no index names: left by another save beside indexed ones, or some of them missing."""
    groups: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for name in contents.files:
        match = _SHARD.match(name)
        if match is not None and name not in named:
            groups[match["stem"], match["count"], match["rest"]][int(match["number"])] = name
    for (stem, count, rest), shards in sorted(groups.items()):
        rivals = sorted(name for name in named if name.endswith(rest[rest.rindex(".") :]) and _stem(name) == stem)
        names = sorted(shards.values())
        if rivals:
            message = f"{_some(names)} belong to no index here: loaders take {_some(rivals)}, which the index names"
            yield contents.finding("stale_shard", message, names[0], remedy=_LEFT_REMEDY)
            continue
        yield from _lost_numbers(contents, f"{stem}*{rest}", shards, int(count))
    yield from _lost_in_index(contents, named)


def _lost_in_index(contents: Contents, named: set[str]) -> Iterator[Finding]:
    """Shards that an index does not name either, where the names of the others count them."""
    groups: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for match in filter(None, map(_SHARD.match, named & contents.files)):
        groups[match["stem"], match["count"], match["rest"]][int(match["number"])] = match[0]
    if named <= contents.files:
        for (stem, count, rest), shards in sorted(groups.items()):
            yield from _lost_numbers(contents, f"{stem}*{rest}", shards, int(count))


def _lost_numbers(contents: Contents, what: str, shards: Mapping[int, str], total: int) -> Iterator[Finding]:
    numbers = set(shards)
    if numbers not in (set(range(total)), set(range(1, total + 1)), set(range(total + 1))):
        first = 0 if 0 in numbers else 1
        lost = sorted(set(range(first, total + first)) - numbers)[:_MAX_NAMES]
        message = f"of {total} shards {what}, {len(numbers)} are here: number {', '.join(map(str, lost))} missing"
        yield contents.finding("missing_shard", message, min(shards.values()))


def _stem(name: str) -> str:
    match = _SHARD.match(name)
    return match["stem"] if match else ""


def _check_whole(contents: Contents, indexes: Iterable[_Index]) -> Iterator[Finding]:
    """A file of the whole model beside the shards of an index: loaders take the one file."""
    for index in indexes:
        whole = index.name.replace(".index", "").removesuffix(".json")
        part = contents.part(whole)
        shards = [shard for name in sorted(index.shards) if (shard := contents.part(name)) is not None]
        if part is None or not shards or whole in index.shards or not part.entries:
            continue
        others = {entry.name: entry for shard in shards for entry in shard.entries}
        if _differ(part, others) is not False:
            message = (
                f"{whole} lies beside {len(shards)} shards with other values: transformers takes {whole}, not those"
            )
            yield contents.finding("stale_weights", message, whole, remedy=_LEFT_REMEDY)


def _check_copies(contents: Contents) -> Iterator[Finding]:
    """The same weights in two formats, with other values: loaders take the safetensors."""
    wholes: dict[tuple[str, str | None], dict[str, str]] = defaultdict(dict)
    for name in sorted(contents.files):
        match = _WHOLE.match(name)
        if match is not None:
            wholes[_SAME_MODEL.get(match["stem"], match["stem"]), match["variant"]][match["kind"]] = name
    for pair in wholes.values():
        parts = {kind: contents.part(name) for kind, name in pair.items()}
        first, second = parts.get("safetensors"), parts.get("bin")
        if first is None or second is None:
            continue
        if _differ(second, {entry.name: entry for entry in first.entries}):
            message = f"{pair['bin']} holds other values than {pair['safetensors']}, which loaders take"
            remedy = "Delete the one that is out of date."
            yield contents.finding("stale_weights", message, pair["bin"], "warning", remedy)


def _differ(part: Source, others: Mapping[str, TensorEntry]) -> bool | None:
    """Whether values of tensors with the same name and shape differ by more than rounding; None if there are none."""
    pairs = [(entry, others[entry.name]) for entry in part.entries if _is_comparable(entry, others.get(entry.name))]
    if not pairs:
        return None
    sample = pairs[:: max(1, len(pairs) // _MAX_SAMPLES)]
    return 2 * sum(_is_other(*pair) for pair in sample) > len(sample)


def _is_comparable(entry: TensorEntry, other: TensorEntry | None) -> bool:
    return other is not None and entry.shape == other.shape and entry.dtype.is_floating_point and entry.numel > 1


def _is_other(one: TensorEntry, other: TensorEntry) -> bool:
    try:
        a, b = (load(entry).flatten()[:_MAX_SAMPLE].to(torch.float32) for entry in (one, other))
    except (DamagedFile, OSError, RuntimeError):
        return False
    return bool((a - b).abs().max() > _MIN_DIFFERENCE * torch.maximum(a.abs().max(), b.abs().max()))


def _named(finding: Finding, name: str) -> Finding:
    return Finding(finding.kind, finding.message, name=name, severity="error", file=finding.file, remedy=finding.remedy)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
