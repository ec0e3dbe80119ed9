"""DeepSpeed checkpoints: weights, and flat partitions of the optimizer state in one file per rank.

A partition holds many parameters, or parts of them, one after the other. Which ones follows from the shapes in the file
with the weights: stages 1 and 2 split the flat buffer of a parameter group evenly, stage 3 splits every parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import read_tag
from hallo_numguard.files.formats.pickles import ForeignObject, StoredTensor, plain
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, state_role
from hallo_numguard.files.formats.torch_zip import Archive, named_tensors, open_archive

LATEST = "latest"
_WEIGHTS = "*_model_states.pt"
_OPTIMIZER = "*_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)")
_MODEL_RANK = re.compile(r"mp_rank_(\d+)")
_RUN_FACTS = (  # keys of the file with the weights that describe the run
    "dp_world_size",
    "mp_world_size",
    "global_steps",
    "global_samples",
    "skipped_steps",
    "ds_version",
    "ds_config",
    "checkpoint_parallel_dimensions",
)
_WEIGHT_KEYS = {  # other keys that DeepSpeed writes; what remains is the client state
    "module",
    "optimizer",
    "param_shapes",
    "buffer_names",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
}
_DTYPES_OF_BLOCKS = {"fp16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}  # in pickles of Python 3.11.0 to 3.11.3
_MAX_RANKS = 1 << 16
_LATEST_REMEDY = "Write the name of the newest complete checkpoint into it."
_MISSING_REMEDY = "Copy the files of every rank, or go back to an earlier checkpoint."


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter in a flat tensor.

    Attributes:
        name: The parameter.
        offset: Position of its first element in the flat tensor, in elements.
        numel: Number of elements.
        start: Flat index of its first element in the parameter.
        whole: Shape of the parameter.
    """

    name: str
    offset: int
    numel: int
    start: int
    whole: tuple[int, ...]


@dataclass
class _Contents:
    """The tensors and the damage found so far."""

    entries: list[TensorEntry] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, archive: Archive, name: str, role: str, tensor: StoredTensor, **more: Any) -> None:
        """Adds a tensor, or the finding that its bytes are missing."""
        try:
            self.entries.append(archive.entry(name, role, tensor, **more))
        except DamagedFile as error:
            self.findings.append(error.finding(archive.path))

    def add_piece(self, archive: Archive, role: str, flat: StoredTensor, piece: _Piece, rank: int) -> None:
        """Adds part of a parameter in a flat tensor."""
        numel = min(piece.numel, math.prod(flat.shape) - piece.offset)
        if numel < piece.numel and role == "fp32":
            cut = DamagedFile(f"holds a partition that is too short for {piece.name}")
            self.findings.append(cut.finding(archive.path))
        if numel > 0:
            part = replace(flat, offset=flat.offset + piece.offset, shape=(numel,), stride=(1,))
            self.add(archive, piece.name, role, part, rank=rank, start=piece.start, whole=piece.whole)


def recognises(path: Path) -> bool:
    """Returns whether the path is the folder of a tag, or the folder above with the file that names the latest tag."""
    return path.is_dir() and ((path / LATEST).is_file() or next(path.glob(_WEIGHTS), None) is not None)


def read(path: Path) -> Source:
    """Returns the weights and the optimizer state of all ranks, under the parameters' names."""
    try:
        folder = _tag_folder(path)
    except DamagedFile as error:
        return Source("deepspeed", path, (path / LATEST,), findings=(error.finding(path / LATEST),))
    contents = _Contents()
    weights = list(_archives(folder, _WEIGHTS, path, contents))
    shards = list(_archives(folder, _OPTIMIZER, path, contents))
    for archive in weights:
        _add_weights(contents, archive, sharded=_rank(archive) is not None)
    by_model_rank: dict[int, list[Archive]] = {}
    for shard in shards:
        by_model_rank.setdefault(_model_rank(shard), []).append(shard)
    for model_rank, group in by_model_rank.items():
        its_weights = next((archive for archive in weights if _model_rank(archive) == model_rank), None)
        if its_weights is not None:
            _add_partitions(contents, its_weights, group)
    metadata = _metadata(folder, weights, shards)
    contents.findings += [*_missing(folder, metadata, shards), *_missing_slices(folder, metadata)]
    files = tuple(sorted(file for file in folder.iterdir() if file.is_file()))
    latest = path / LATEST
    archives = [*weights, *shards]
    return Source(
        f"deepspeed zero-{metadata['zero_stage']}",
        path,
        (latest, *files) if latest.is_file() else files,
        contents.entries,
        (*contents.findings, *(finding for archive in archives for finding in archive.findings)),
        metadata=metadata,
        checksums=tuple(checksum for archive in archives for checksum in archive.checksums),
    )


def configured_dtype(config: Mapping[str, Any]) -> str | None:
    """Returns the training dtype that a DeepSpeed configuration enables, if any."""
    enabled = (name for name in _DTYPES_OF_BLOCKS if _dict(config.get(name)).get("enabled") is True)
    return next((_DTYPES_OF_BLOCKS[name] for name in enabled), None)


def _tag_folder(path: Path) -> Path:
    """The folder of the latest tag, or the path itself if no file names one."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    tag = read_tag(latest)
    folder = path / tag
    if next(folder.glob(_WEIGHTS), None) is None:
        raise DamagedFile(f"names {tag}, but no such folder has weights", kind="missing", remedy=_LATEST_REMEDY)
    return folder


def _archives(folder: Path, pattern: str, root: Path, contents: _Contents) -> Iterator[Archive]:
    for file in sorted(folder.glob(pattern), key=_numeric_order):
        try:
            archive = open_archive(file)
            if not isinstance(archive.value, Mapping):
                raise DamagedFile("does not hold a dictionary, as DeepSpeed writes it")
            yield archive
        except DamagedFile as error:
            contents.findings.append(error.finding(file))


def _numeric_order(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _rank(archive: Archive) -> int | None:
    found = _RANK.search(archive.path.name)
    return None if found is None else int(found[1])


def _model_rank(archive: Archive) -> int:
    found = _MODEL_RANK.search(archive.path.name)
    return 0 if found is None else int(found[1])


def _add_weights(contents: _Contents, archive: Archive, sharded: bool) -> None:
    """Adds what one file of weights holds.

    Weights and buffers; for stage 3, buffers and this rank's part of the frozen weights; for stage 0, optimizer state.
    """
    value = archive.value
    rank = _rank(archive)
    buffers = set(filter(_is_text, _list(value.get("buffer_names"))))
    for name, tensor in named_tensors(value.get("module", value)):
        if 0 not in tensor.shape:
            contents.add(archive, name, "buffer" if name in buffers else "parameter", tensor, rank=rank)
    if sharded:
        shapes = _shapes(value.get("frozen_param_shapes"))
        for name, tensor in _dict(value.get("frozen_param_fragments")).items():
            if isinstance(tensor, StoredTensor) and name in shapes:
                start = math.prod(tensor.shape) * (rank or 0)
                numel = min(math.prod(tensor.shape), math.prod(shapes[name]) - start)  # without padding
                if numel > 0:
                    piece = _Piece(name, 0, numel, start, shapes[name])
                    contents.add_piece(archive, "parameter", tensor, piece, rank or 0)
    _add_whole_states(contents, archive)


def _add_whole_states(contents: _Contents, archive: Archive) -> None:
    """Stage 0: the state of each parameter, by its number in the order of the weights."""
    optimizer = _dict(archive.value.get("optimizer"))
    states = _dict(_dict(optimizer.get("optimizer_state_dict")).get("state")) or _dict(optimizer.get("state"))
    masters = [item for group in _list(optimizer.get("fp32_groups")) for item in _list(group)]
    names = _names_of_states(archive, states, masters)
    for number, tensor in enumerate(masters):
        if isinstance(tensor, StoredTensor):
            contents.add(archive, names.get(number, f"parameter {number}"), "fp32", tensor)
    for number, state in states.items():
        for key, tensor in _dict(state).items():
            if isinstance(tensor, StoredTensor):
                contents.add(archive, names.get(number, f"parameter {number}"), state_role(str(key)), tensor)


def _names_of_states(archive: Archive, states: Mapping[Any, Any], masters: Sequence[Any]) -> dict[Any, str]:
    """Parameter names by number, found by matching the shapes of the states with those of the weights in order.

    The file does not say which weights are frozen; where several matchings exist, nothing is named.
    """
    shapes = [state["exp_avg"].shape for state in map(_dict, states.values()) if _has_moments(state)]
    shapes = shapes or [tensor.shape for tensor in masters if isinstance(tensor, StoredTensor)]
    buffers = set(filter(_is_text, _list(archive.value.get("buffer_names"))))
    places: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {}  # tied weights have one state
    for name, tensor in named_tensors(archive.value.get("module")):
        if name not in buffers:
            places.setdefault((tensor.storage.key, tensor.offset), (name, tensor.shape))
    weights = list(places.values())
    first, last = _matched(weights, shapes), _matched(weights[::-1], shapes[::-1])[::-1]
    return dict(enumerate(first)) if first == last and len(first) == len(shapes) else {}


def _matched(weights: Sequence[tuple[str, tuple[int, ...]]], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """Names of the earliest weights that have these shapes in this order."""
    remaining = iter(weights)
    return [next((name for name, found in remaining if found == shape), "") for shape in shapes]


def _has_moments(state: Mapping[Any, Any]) -> bool:
    return isinstance(state.get("exp_avg"), StoredTensor)


def _add_partitions(contents: _Contents, weights: Archive, shards: Sequence[Archive]) -> None:
    """Stages 1 to 3: adds the pieces of parameters in each rank's partitions."""
    groups = [_shapes(group) for group in _list(weights.value.get("param_shapes"))]
    flats = {id(shard): _flat_tensors(_optimizer(shard)) for shard in shards}
    world = max(_world(weights, shards), 1)
    sizes = [
        max(math.prod(flats[id(shard)][number].shape) for shard in shards if number < len(flats[id(shard)]))
        for number in range(max((len(flat) for flat in flats.values()), default=0))
    ]
    for shard in shards:
        optimizer, rank = _optimizer(shard), _rank(shard) or 0
        if "fp32_flat_groups" in optimizer:  # stage 3
            pieces = _split_parameters(groups, [math.prod(flat.shape) for flat in flats[id(shard)]], world, rank)
        else:
            pieces = list(_split_buffers(groups, sizes, _list(optimizer.get("param_alignment_paddings")), rank))
        for number, flat in enumerate(flats[id(shard)]):
            its_pieces = pieces[number] if number < len(pieces) else []
            for key, tensor in {"fp32": flat, **_state(optimizer, number)}.items():
                if not isinstance(tensor, StoredTensor):
                    continue
                if math.prod(tensor.shape) < math.prod(flat.shape):  # for example a step counter
                    contents.add(shard, f"param_groups.{number}", state_role(str(key)), tensor, rank=rank)
                    continue
                for piece in its_pieces:
                    contents.add_piece(shard, state_role(str(key)), tensor, piece, rank)


def _split_buffers(
    groups: Sequence[Mapping[str, tuple[int, ...]]], sizes: Sequence[int], paddings: Sequence[Any], rank: int
) -> Iterator[list[_Piece]]:
    """Stages 1 and 2: each rank has an equal part of each group's flat buffer."""
    for number, (group, size) in enumerate(zip(groups, sizes, strict=False)):
        low, high = rank * size, (rank + 1) * size
        pads = _list(paddings[number]) if number < len(paddings) else []
        pieces, position = [], 0
        for row, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            begin, end = max(position, low), min(position + numel, high)
            if begin < end:
                pieces.append(_Piece(name, begin - low, end - begin, begin - position, shape))
            pad = pads[row] if row < len(pads) else 0
            position += numel + (pad if isinstance(pad, int) else 0)
        yield pieces


def _split_parameters(
    groups: Sequence[Mapping[str, tuple[int, ...]]], sizes: Sequence[int], world: int, rank: int
) -> list[list[_Piece]]:
    """Stage 3: each rank has an equal part of each parameter; the parts fill its sub-groups one after the other."""
    pieces: list[list[_Piece]] = [[] for _ in sizes]
    number, position = 0, 0
    for name, shape in (item for group in groups for item in group.items()):
        part = -(-math.prod(shape) // world)
        while number < len(sizes) and position >= sizes[number]:
            number, position = number + 1, position - sizes[number]
        if number == len(sizes):
            break
        numel = min(part, math.prod(shape) - part * rank)  # without padding
        if numel > 0:
            pieces[number].append(_Piece(name, position, numel, part * rank, shape))
        position += part
    return pieces


def _optimizer(shard: Archive) -> Mapping[str, Any]:
    return _dict(shard.value.get("optimizer_state_dict"))


def _flat_tensors(optimizer: Mapping[str, Any]) -> list[StoredTensor]:
    key = "fp32_flat_groups" if "fp32_flat_groups" in optimizer else "single_partition_of_fp32_groups"
    return [item for item in _list(optimizer.get(key)) if isinstance(item, StoredTensor)]


def _inner(optimizer: Mapping[str, Any]) -> Any:
    return optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state"))


def _state(optimizer: Mapping[str, Any], number: int) -> Mapping[Any, Any]:
    """The state of a flat tensor. Elastic checkpoints keep the states in a list."""
    inner = _inner(optimizer)
    if isinstance(inner, list):
        return _dict(inner[number]) if number < len(inner) else {}
    return _dict(_dict(_dict(inner).get("state")).get(number))


def _metadata(folder: Path, weights: Sequence[Archive], shards: Sequence[Archive]) -> dict[str, Any]:
    """Facts about the run that wrote the files."""
    value = weights[0].value if weights else {}
    optimizer = _optimizer(shards[0]) if shards else _dict(value.get("optimizer"))
    facts = {key: plain(value[key]) for key in _RUN_FACTS if key in value}
    client = {
        key: plain(item) for key, item in value.items() if _is_text(key) and key not in (*_RUN_FACTS, *_WEIGHT_KEYS)
    }
    count = optimizer.get("partition_count")
    groups = _list(_dict(_inner(optimizer)).get("param_groups")) or _list(optimizer.get("param_groups"))
    return {
        **facts,
        "tag": folder.name,
        "zero_stage": _stage(optimizer, bool(shards)),
        "dtype": _dtype(facts.get("ds_config"), value),
        "partition_count": max(filter(_is_count, count), default=None) if isinstance(count, list) else plain(count),
        "model_files": len(weights),
        "optimizer_files": len(shards),
        "loss_scaler": _scaler(optimizer),
        "param_groups": [
            {key: plain(item) for key, item in _dict(group).items() if key != "params"} for group in groups
        ],
        "client_state": client,
        "foreign": sorted(set().union(*(archive.unpickled.foreign for archive in [*weights, *shards]))),
    }


def _stage(optimizer: Mapping[str, Any], has_shards: bool) -> int:
    """The ZeRO stage. The optimizer for bfloat16 with float32 gradients works like stage 1 and does not say so."""
    stage = plain(optimizer.get("zero_stage"))
    stage = _STAGES.get(stage, stage) if _is_text(stage) else stage
    if _is_count(stage):
        return int(stage)
    if "fp32_flat_groups" in optimizer:
        return 3
    return 1 if has_shards else 0


def _dtype(config: Any, value: Mapping[str, Any]) -> str:
    """The dtype of training: that of the configuration, or of most weights."""
    if dtype := configured_dtype(_dict(config)):
        return dtype
    buffers = set(filter(_is_text, _list(value.get("buffer_names"))))
    dtypes = [str(tensor.dtype) for name, tensor in named_tensors(value.get("module")) if name not in buffers]
    return max(sorted(set(dtypes)), key=dtypes.count, default="torch.float32").removeprefix("torch.")


def _scaler(optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    scaler = optimizer.get("loss_scaler")
    state = _dict(scaler.state) if isinstance(scaler, ForeignObject) else optimizer
    if "cur_scale" not in state:
        return None
    scalars = {key: item for key, item in state.items() if isinstance(item, (bool, int, float))}
    return {**scalars, "dynamic": plain(optimizer.get("dynamic_loss_scale", state.get("dynamic")))}


def _world(weights: Archive, shards: Sequence[Archive]) -> int:
    """Number of data-parallel ranks that wrote the checkpoint."""
    size = weights.value.get("dp_world_size")
    return size if _is_count(size) else len(shards)


def _missing(folder: Path, metadata: Mapping[str, Any], shards: Sequence[Archive]) -> Iterator[Finding]:
    """Ranks whose file is missing: except with stage 0, every rank writes one."""
    world = metadata.get("dp_world_size")
    if metadata["zero_stage"] == 0 or not isinstance(world, int) or not 0 <= world <= _MAX_RANKS:
        return
    for pattern, what in ((_OPTIMIZER, "optimizer state"), (_WEIGHTS, "model state")):
        present = {int(found[1]) for file in folder.glob(pattern) if (found := _RANK.search(file.name))}
        if what == "model state" and not present:  # stages 1 and 2 have one for all ranks
            continue
        for rank in sorted(set(range(world)) - present):
            message = f"{folder.name}: the {what} of rank {rank} is missing: {world} ranks wrote this checkpoint"
            yield Finding("missing_shard", message, severity="error", file=str(folder), remedy=_MISSING_REMEDY)


def _missing_slices(folder: Path, metadata: Mapping[str, Any]) -> Iterator[Finding]:
    """Slices of a tensor-parallel model whose file of weights is missing."""
    size = metadata.get("mp_world_size")
    present = {int(found[1]) for file in folder.glob(_WEIGHTS) if (found := _MODEL_RANK.search(file.name))}
    if isinstance(size, int) and 1 < size <= _MAX_RANKS:
        for rank in sorted(set(range(size)) - present):
            message = (
                f"{folder.name}: the weights of slice {rank} are missing: the model has {size} (mp_rank_{rank:02d})"
            )
            yield Finding("missing_shard", message, severity="error", file=str(folder), remedy=_MISSING_REMEDY)


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(shape)
        for name, shape in _dict(value).items()
        if _is_text(name) and isinstance(shape, (tuple, list)) and all(_is_count(size) for size in shape)
    }


def _dict(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40
