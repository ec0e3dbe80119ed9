"""Checkpoints of torch.distributed.checkpoint: files with blocks of tensors, and a pickle with their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import is_plain, read_small
from hallo_numguard.files.formats.pickles import ForeignObject, StoredTensor, unpickle
from hallo_numguard.files.formats.source import Checksum, DamagedFile, Source, TensorEntry, damaged, role_of
from hallo_numguard.files.formats.torch_zip import open_archive

LAYOUT = "torch.distributed.checkpoint"
METADATA = ".metadata"
_SHARDS = "*.distcp"
_MAX_METADATA_BYTES = 64 << 20
_REMEDY = "Copy the files of every rank, or go back to an earlier checkpoint."


@dataclass(frozen=True)
class _Block:
    """A block of a tensor: an archive of its own, `nbytes` long at `offset` in a file.

    `corner` is the index of its first element in the tensor, whose shape is `whole`.
    """

    name: str
    corner: tuple[int, ...]
    whole: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def recognises(path: Path) -> bool:
    """Returns whether the path is the folder of such a checkpoint."""
    return path.is_dir() and ((path / METADATA).exists() or next(path.glob(_SHARDS), None) is not None)


def read(path: Path) -> Source:
    """Returns the blocks of all tensors. Other objects are left out."""
    index = path / METADATA
    try:
        unpickled = unpickle(read_small(index, _MAX_METADATA_BYTES))
        blocks = list(_blocks(unpickled.value))
    except DamagedFile as error:
        return _without_index(path, error)
    findings = unpickled.code_findings(index)
    entries: list[TensorEntry] = []
    checksums: list[Checksum] = []
    for block in blocks:
        file = path / block.file
        try:
            entries.append(_read(file, path, block, checksums))
        except DamagedFile as error:
            findings.append(replace(error.finding(file), name=block.name))
    files = sorted({path / block.file for block in blocks} & set(path.iterdir()))
    metadata = _optimizers(unpickled.value)
    found, sums = _by_cause(findings, path), tuple(checksums)
    return Source(LAYOUT, path, (index, *files), entries, found, metadata=metadata, checksums=sums)


def _optimizers(metadata: Any) -> dict[str, Any]:
    """The metadata "optimizers": those whose groups are in the index, with the names of their settings and states."""
    names = [name for name in _state(metadata).get("state_dict_metadata") or () if isinstance(name, str)]
    found = []
    for path in sorted({name.partition(".param_groups")[0] for name in names if ".param_groups." in name}):
        keys = {name.rpartition(".")[2] for name in names if name.startswith(f"{path}.param_groups.")}
        settings = dict.fromkeys(keys - {"params"}, True)
        states: dict[str, dict[str, bool]] = {}
        for owner, _, key in (name.rpartition(".") for name in names if name.startswith(f"{path}.state.")):
            states.setdefault(owner, {})[key] = True
        found.append({"path": path, "groups": [settings], "states": states})
    return {"optimizers": found} if found else {}


def _without_index(path: Path, error: DamagedFile) -> Source:
    """A checkpoint of which nothing can be read, because its index is missing or damaged."""
    index = path / METADATA
    if not index.exists():
        unfinished = sorted(file.name for file in path.glob(f"{METADATA}*"))
        left = f" ({unfinished[0]} was left: the run ended while it was written)" if unfinished else ""
        error = DamagedFile(
            f"is missing, and without it the {len(list(path.glob(_SHARDS)))} files of {path.resolve().name} cannot be "
            f"loaded{left}",
            "missing",
            "It is written last: the save did not end. Go back to an earlier checkpoint.",
        )
    return replace(damaged(LAYOUT, index, error), files=(index, *sorted(path.glob(_SHARDS))))


def _blocks(metadata: Any) -> Iterator[_Block]:
    state = _state(metadata)
    tensors, places = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(tensors, Mapping) or not isinstance(places, Mapping):
        raise DamagedFile("does not describe a checkpoint")
    for key, place in places.items():
        index, where = _state(key), _state(place)
        whole = _shape(_state(tensors.get(index.get("fqn"))).get("size"))
        if whole is None:  # another object
            continue
        corner = _shape(index.get("offset"))
        corner = (0,) * len(whole) if corner is None else corner
        file, extent = where.get("relative_path"), _shape([where.get("offset"), where.get("length")])
        if len(corner) != len(whole) or not isinstance(file, str) or extent is None:
            raise DamagedFile(f"does not say where {index.get('fqn')} is stored")
        yield _Block(str(index.get("fqn")), corner, whole, file, *extent)


def _read(file: Path, root: Path, block: _Block, checksums: list[Checksum]) -> TensorEntry:
    if not is_plain(block.file):
        raise DamagedFile(f"leads out of the folder: {block.file}", kind="escape", remedy=_REMEDY)
    if not file.exists():
        raise DamagedFile("is missing", kind="missing_shard", remedy=_REMEDY)
    archive = open_archive(file, block.offset, block.nbytes)
    tensor = archive.value
    if not isinstance(tensor, StoredTensor) or len(tensor.shape) != len(block.whole):
        raise DamagedFile(f"does not hold {block.name} where the index says")
    checksums += archive.checksums
    is_piece = tensor.shape != block.whole
    where = {"whole": block.whole, "corner": block.corner} if is_piece else {}
    return archive.entry(block.name, role_of(block.name), tensor, **where)


def _state(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, ForeignObject) or not isinstance(value.state, Mapping):
        return {}
    return value.state


def _shape(value: Any) -> tuple[int, ...] | None:
    """The value as a shape; None if it is not one."""
    if not isinstance(value, (tuple, list)) or not all(type(size) is int and 0 <= size < 1 << 48 for size in value):
        return None
    return tuple(value)


def _by_cause(findings: list[Finding], folder: Path) -> tuple[Finding, ...]:
    """One finding for each damaged file, not one for each tensor in it."""
    by_file: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_file.setdefault((finding.kind, finding.file), []).append(finding)
    joined = []
    for (_, file), group in by_file.items():
        first = group[0]
        names = [finding.name for finding in group if finding.name]
        more = f" ({len(names)} tensors lie in it, such as {names[0]})" if len(names) > 1 else ""
        name = "" if len(names) > 1 else first.name
        message = first.message if Path(file).parent != folder else f"{first.message}{more}"
        joined.append(replace(first, message=message, name=name))
    return tuple(joined)
