"""Checkpoints of DeepSpeed: weights of all ranks, and flat partitions of the optimizer's state, one file a rank.

A partition holds many parameters, or parts of them, one after the other. Which, follows from the shapes in the file of
the weights: stages 1 and 2 cut the flat buffer of a group into equal parts, stage 3 cuts every parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import check_inside, tag_in
from hallo_numguard.files.formats.pickles import Inert, StoredTensor, inert
from hallo_numguard.files.formats.source import DamagedFile, Source, TensorEntry, role_of
from hallo_numguard.files.formats.torch_zip import Archive, named_tensors, open_archive

LATEST = "latest"
_WEIGHTS = "*_model_states.pt"
_OPTIMIZER = "*_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)")
_MODEL_RANK = re.compile(r"mp_rank_(\d+)")
_FACTS = (
    "dp_world_size",
    "mp_world_size",
    "global_steps",
    "global_samples",
    "skipped_steps",
    "ds_version",
    "ds_config",
    "checkpoint_parallel_dimensions",
)
_OURS = {
    "module",
    "optimizer",
    "param_shapes",
    "buffer_names",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
}
_SCALER = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "scale_factor",
    "scale_window",
    "min_scale",
    "cur_hysteresis",
    "delayed_shift",
)
_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}  # as some releases of Python write them
_MOST_RANKS = 1 << 16  # that are looked for
_LATEST_REMEDY = "Write the name of the newest whole checkpoint into it."
_MISSING_REMEDY = "Copy the files of every rank, or go back to an earlier checkpoint."


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter in a flat tensor: where it begins there, how many elements, and where in the parameter."""

    name: str
    offset: int
    numel: int
    start: int
    whole: tuple[int, ...]


@dataclass
class _Draft:
    """What was found so far."""

    entries: list[TensorEntry] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, archive: Archive, name: str, role: str, tensor: StoredTensor, **more: Any) -> None:
        """Adds a tensor, or the finding that its bytes are not there."""
        try:
            self.entries.append(archive.entry(name, role, tensor, **more))
        except DamagedFile as error:
            self.findings.append(error.finding(archive.path))

    def add_piece(self, archive: Archive, role: str, flat: StoredTensor, piece: _Piece, rank: int) -> None:
        """Adds a part of a parameter that lies in a flat tensor."""
        numel = min(piece.numel, math.prod(flat.shape) - piece.offset)
        if numel < piece.numel and role == "fp32":
            cut = DamagedFile(f"holds a partition that is too short for {piece.name}")
            self.findings.append(cut.finding(archive.path))
        if numel > 0:
            part = replace(flat, offset=flat.offset + piece.offset, shape=(numel,), stride=(1,))
            self.add(archive, piece.name, role, part, rank=rank, start=piece.start, whole=piece.whole)


def recognises(path: Path) -> bool:
    """Returns whether it is the folder of a tag, or the one above with the file that names the latest tag."""
    return path.is_dir() and ((path / LATEST).is_file() or next(path.glob(_WEIGHTS), None) is not None)


def read(path: Path) -> Source:
    """Returns the weights and the optimizer's state of all ranks, by the parameters' names."""
    try:
        folder = _tag_folder(path)
    except DamagedFile as error:
        return Source("deepspeed", path, (path / LATEST,), findings=(error.finding(path / LATEST),))
    draft = _Draft()
    weights = list(_archives(folder, _WEIGHTS, path, draft))
    shards = list(_archives(folder, _OPTIMIZER, path, draft))
    for archive in weights:
        _add_weights(draft, archive, sharded=_rank(archive) is not None)
    by_model_rank: dict[int, list[Archive]] = {}
    for shard in shards:
        by_model_rank.setdefault(_model_rank(shard), []).append(shard)
    for number, group in by_model_rank.items():
        of_rank = next((one for one in weights if _model_rank(one) == number), None)
        if of_rank is not None:
            _add_partitions(draft, of_rank, group)
    metadata = _metadata(folder, weights, shards)
    draft.findings += _missing(folder, metadata, shards)
    files = tuple(sorted(file for file in folder.iterdir() if file.is_file()))
    latest = path / LATEST
    archives = [*weights, *shards]
    return Source(
        f"deepspeed zero-{metadata['zero_stage']}",
        path,
        (latest, *files) if latest.is_file() else files,
        draft.entries,
        (*draft.findings, *(finding for archive in archives for finding in archive.findings)),
        metadata=metadata,
        checksums=tuple(checksum for archive in archives for checksum in archive.checksums),
    )


def _tag_folder(path: Path) -> Path:
    """The folder of the tag that `latest` names, or the path itself if there is no such file."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    tag = tag_in(latest)
    folder = path / tag
    if next(folder.glob(_WEIGHTS), None) is None:
        raise DamagedFile(
            f"names {tag}, and there are no weights in such a folder", kind="missing", remedy=_LATEST_REMEDY
        )
    check_inside(folder, path)
    return folder


def _archives(folder: Path, pattern: str, root: Path, draft: _Draft) -> Iterator[Archive]:
    for file in sorted(folder.glob(pattern), key=_natural):
        try:
            check_inside(file, root)
            archive = open_archive(file)
            if not isinstance(archive.value, Mapping):
                raise DamagedFile("holds no dictionary, as DeepSpeed writes it")
            yield archive
        except DamagedFile as error:
            draft.findings.append(error.finding(file))


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _rank(archive: Archive) -> int | None:
    found = _RANK.search(archive.path.name)
    return None if found is None else int(found[1])


def _model_rank(archive: Archive) -> int:
    found = _MODEL_RANK.search(archive.path.name)
    return 0 if found is None else int(found[1])


def _add_weights(draft: _Draft, archive: Archive, sharded: bool) -> None:
    """Adds weights and buffers; of stage 3, buffers and this rank's part of the frozen weights; of stage 0, states."""
    value = archive.value
    rank = _rank(archive)
    buffers = set(filter(_is_text, _list(value.get("buffer_names"))))
    for name, tensor in named_tensors(value.get("module", value)):
        if 0 not in tensor.shape:
            draft.add(archive, name, "buffer" if name in buffers else "parameter", tensor, rank=rank)
    if sharded:
        shapes = _shapes(value.get("frozen_param_shapes"))
        for name, tensor in _dict(value.get("frozen_param_fragments")).items():
            if isinstance(tensor, StoredTensor) and name in shapes:
                part = math.prod(tensor.shape)
                start = part * (rank or 0)
                real = min(part, math.prod(shapes[name]) - start)
                if real > 0:
                    draft.add_piece(archive, "parameter", tensor, _Piece(name, 0, real, start, shapes[name]), rank or 0)
    _add_whole_states(draft, archive)


def _add_whole_states(draft: _Draft, archive: Archive) -> None:
    """Stage 0: the states of each parameter, by its number in the order of the weights."""
    optimizer = _dict(archive.value.get("optimizer"))
    states = _dict(_dict(optimizer.get("optimizer_state_dict")).get("state")) or _dict(optimizer.get("state"))
    masters = [item for group in _list(optimizer.get("fp32_groups")) for item in _list(group)]
    names = _names_of_states(archive, states, masters)
    for number, tensor in enumerate(masters):
        if isinstance(tensor, StoredTensor):
            draft.add(archive, names.get(number, f"parameter {number}"), "fp32", tensor)
    for number, state in states.items():
        for key, tensor in _dict(state).items():
            if isinstance(tensor, StoredTensor):
                draft.add(archive, names.get(number, f"parameter {number}"), role_of(str(key)), tensor)


def _names_of_states(archive: Archive, states: Mapping[Any, Any], masters: Sequence[Any]) -> dict[Any, str]:
    """Names by number: the one way in which the shapes of the states follow each other among those of the weights.

    The file does not say which weights are frozen. If there are several ways, nothing is named.
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
    """Names of the earliest weights with these shapes, in their order."""
    left = iter(weights)
    return [next((name for name, found in left if found == shape), "") for shape in shapes]


def _has_moments(state: Mapping[Any, Any]) -> bool:
    return isinstance(state.get("exp_avg"), StoredTensor)


def _add_partitions(draft: _Draft, weights: Archive, shards: Sequence[Archive]) -> None:
    """Stages 1 to 3: what each rank's partitions hold."""
    groups = [_shapes(group) for group in _list(weights.value.get("param_shapes"))]
    flats = {id(shard): _flat_tensors(_optimizer(shard)) for shard in shards}
    world = max(_world(weights, shards), 1)
    sizes = [
        max(math.prod(flats[id(shard)][number].shape) for shard in shards if number < len(flats[id(shard)]))
        for number in range(max((len(flat) for flat in flats.values()), default=0))
    ]
    for shard in shards:
        optimizer, rank = _optimizer(shard), _rank(shard) or 0
        whole_parameters = "fp32_flat_groups" in optimizer
        if whole_parameters:
            pieces = _cut_parameters(groups, [math.prod(flat.shape) for flat in flats[id(shard)]], world, rank)
        else:
            pieces = list(_cut_buffers(groups, sizes, _list(optimizer.get("param_alignment_paddings")), rank))
        for number, flat in enumerate(flats[id(shard)]):
            of_flat = pieces[number] if number < len(pieces) else []
            state = _state(optimizer, number)
            tensors = {"fp32": flat, **{key: one for key, one in state.items() if isinstance(one, StoredTensor)}}
            for key, tensor in tensors.items():
                if math.prod(tensor.shape) < math.prod(flat.shape):  # a step counter, say
                    draft.add(shard, f"param_groups.{number}", role_of(str(key)), tensor, rank=rank)
                    continue
                for piece in of_flat:
                    draft.add_piece(shard, role_of(str(key)), tensor, piece, rank)


def _cut_buffers(
    groups: Sequence[Mapping[str, tuple[int, ...]]], sizes: Sequence[int], paddings: Sequence[Any], rank: int
) -> Iterator[list[_Piece]]:
    """Stages 1 and 2: a rank has one of equal parts of each group's flat buffer."""
    for number, (group, size) in enumerate(zip(groups, sizes, strict=False)):
        low, high = rank * size, (rank + 1) * size
        pads = _list(paddings[number]) if number < len(paddings) else []
        pieces, at = [], 0
        for position, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            begin, end = max(at, low), min(at + numel, high)
            if begin < end:
                pieces.append(_Piece(name, begin - low, end - begin, begin - at, shape))
            pad = pads[position] if position < len(pads) else 0
            at += numel + (pad if isinstance(pad, int) else 0)
        yield pieces


def _cut_parameters(
    groups: Sequence[Mapping[str, tuple[int, ...]]], sizes: Sequence[int], world: int, rank: int
) -> list[list[_Piece]]:
    """Stage 3: a rank has one of equal parts of each parameter; they fill its sub-groups one after the other."""
    pieces: list[list[_Piece]] = [[] for _ in sizes]
    number, at = 0, 0
    for name, shape in (item for group in groups for item in group.items()):
        part = -(-math.prod(shape) // world)
        while number < len(sizes) and at >= sizes[number]:
            number, at = number + 1, at - sizes[number]
        if number == len(sizes):
            break
        real = min(part, math.prod(shape) - part * rank)
        if real > 0:
            pieces[number].append(_Piece(name, at, real, part * rank, shape))
        at += part
    return pieces


def _optimizer(shard: Archive) -> Mapping[str, Any]:
    return _dict(shard.value.get("optimizer_state_dict"))


def _flat_tensors(optimizer: Mapping[str, Any]) -> list[StoredTensor]:
    key = "fp32_flat_groups" if "fp32_flat_groups" in optimizer else "single_partition_of_fp32_groups"
    return [item for item in _list(optimizer.get(key)) if isinstance(item, StoredTensor)]


def _inner(optimizer: Mapping[str, Any]) -> Any:
    return optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state"))


def _state(optimizer: Mapping[str, Any], number: int) -> Mapping[Any, Any]:
    """The state of a flat tensor; with elastic checkpoints, a list holds them."""
    inner = _inner(optimizer)
    if isinstance(inner, list):
        return _dict(inner[number]) if number < len(inner) else {}
    return _dict(_dict(_dict(inner).get("state")).get(number))


def _metadata(folder: Path, weights: Sequence[Archive], shards: Sequence[Archive]) -> dict[str, Any]:
    """What the files say of the run that wrote them."""
    value = weights[0].value if weights else {}
    optimizer = _optimizer(shards[0]) if shards else _dict(value.get("optimizer"))
    facts = {key: inert(value[key]) for key in _FACTS if key in value}
    client = {key: inert(item) for key, item in value.items() if _is_text(key) and key not in (*_FACTS, *_OURS)}
    count = optimizer.get("partition_count")
    groups = _list(_dict(_inner(optimizer)).get("param_groups")) or _list(optimizer.get("param_groups"))
    return {
        **facts,
        "tag": folder.name,
        "zero_stage": _stage(optimizer, bool(shards)),
        "dtype": _dtype(facts.get("ds_config"), value),
        "partition_count": max(filter(_is_count, count), default=None) if isinstance(count, list) else inert(count),
        "model_files": len(weights),
        "optimizer_files": len(shards),
        "loss_scaler": _scaler(optimizer),
        "param_groups": [
            {key: inert(item) for key, item in _dict(group).items() if key != "params"} for group in groups
        ],
        "client_state": client,
        "foreign": sorted(set().union(*(archive.unpickled.foreign for archive in [*weights, *shards]))),
    }


def _stage(optimizer: Mapping[str, Any], has_shards: bool) -> int:
    """The stage of ZeRO; the optimizer of bfloat16 with gradients in float32 is like stage 1, and does not say so."""
    stage = inert(optimizer.get("zero_stage"))
    stage = _STAGES.get(stage, stage) if _is_text(stage) else stage
    if _is_count(stage):
        return int(stage)
    if "fp32_flat_groups" in optimizer:
        return 3
    return 1 if has_shards else 0


def _dtype(config: Any, value: Mapping[str, Any]) -> str:
    """The dtype that the model was trained in: the configuration's, or that of most of its weights."""
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")):
        if _dict(_dict(config).get(name)).get("enabled") is True:
            return dtype
    buffers = set(filter(_is_text, _list(value.get("buffer_names"))))
    dtypes = [str(tensor.dtype) for name, tensor in named_tensors(value.get("module")) if name not in buffers]
    return max(sorted(set(dtypes)), key=dtypes.count, default="torch.float32").removeprefix("torch.")


def _scaler(optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the loss scaler; None where there is none."""
    scaler = optimizer.get("loss_scaler")
    state = _dict(scaler.state) if isinstance(scaler, Inert) else optimizer
    if "cur_scale" not in state:
        return None
    known = {key: inert(state[key]) for key in _SCALER if key in state}
    return {**known, "dynamic": inert(optimizer.get("dynamic_loss_scale", state.get("dynamic")))}


def _world(weights: Archive, shards: Sequence[Archive]) -> int:
    """Number of data-parallel ranks that wrote the checkpoint, as its files say."""
    said = weights.value.get("dp_world_size")
    return said if _is_count(said) else len(shards)


def _missing(folder: Path, metadata: Mapping[str, Any], shards: Sequence[Archive]) -> Iterator[Finding]:
    """Ranks whose file is not there: every rank wrote one, but for stage 0."""
    world = metadata.get("dp_world_size")
    if metadata["zero_stage"] == 0 or not isinstance(world, int) or not 0 <= world <= _MOST_RANKS:
        return
    there = {int(found[1]) for file in folder.glob(_OPTIMIZER) if (found := _RANK.search(file.name))}
    for rank in sorted(set(range(world)) - there):
        message = f"the optimizer's state of rank {rank} is missing: {world} ranks wrote this checkpoint"
        yield Finding(
            "missing_shard", f"{folder.name}: {message}", severity="error", file=str(folder), remedy=_MISSING_REMEDY
        )


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
