"""The tensors of files under a model's names: out of their containers, and without prefixes if the model holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, load
from hallo_numguard.files.preflight.keys import prefixes
from hallo_numguard.files.preflight.loaded import LoadedModel, is_constant, is_equal

_OTHER_FILES = re.compile(
    r"^(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|custom_checkpoint|dl_state)"
)
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|base_model\.model|modules_to_save\.\w+)\."
)
_ADAPTER_PART = re.compile(
    r"(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|hada_\w+|lokr_\w+|ia3_l)\.\w+?(\.weight)?$"
)
IS_ADAPTER = re.compile(r"lora_|hada_|lokr_|ia3_|prompt_|modules_to_save|adapter")
_MAX_PLACES = 256  # modules that a file may be of
_MAX_CHECKED = 8  # tensors, to tell whether the model holds them


@dataclass
class FileTensors:
    """The tensors of files under the names of a model.

    Attributes:
        path: The file, or folder, that messages name.
        entries: Tensor by name; a name that the model does not have is as in the file.
        verified: Whether the model holds these values under names that it has by removing prefixes.
        is_adapter: Whether there are only weights of adapters.
    """

    path: Path
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    verified: bool = False
    is_adapter: bool = False


def collect(model: LoadedModel, sources: Sequence[Source], is_loaded: bool) -> FileTensors:
    """Returns the tensors of all sources as those of one model.

    Args:
        model: The model.
        sources: Files and folders that belong together.
        is_loaded: Whether the model should hold their values: prefixes are then removed where it does.
    """
    first = sources[0].root
    found = FileTensors(first if len(sources) == 1 else first.parent)
    for source in sources:
        for leaf in _leaves(source):
            for names in _best(model, leaf):
                renamed = _renamed(model, names, is_loaded)
                found.verified |= renamed is not names
                for name, entry in renamed.items():
                    found.entries.setdefault(name, entry)
    found.is_adapter = bool(found.entries) and all(IS_ADAPTER.search(name) for name in found.entries)
    return found


def _leaves(source: Source) -> Iterator[Source]:
    """Files of weights; a checkpoint of several files is one."""
    if not source.parts:
        if not _OTHER_FILES.match(source.root.name):
            yield source
        return
    for part in source.parts:
        yield from _leaves(part)


def _best(model: LoadedModel, leaf: Source) -> list[dict[str, TensorEntry]]:
    """The tensors of a file by name, without the keys of the containers around those that fit the model best."""
    weights = {entry.name: entry for entry in leaf.entries if entry.role in ("parameter", "buffer")}
    masters = {entry.name: entry for entry in leaf.entries if entry.role == "fp32"}
    weights = masters | weights
    holders = leaf.metadata.get("holders") or ("",)
    held: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in weights.items():
        holder = max((one for one in holders if not one or name.startswith(f"{one}.")), key=len, default="")
        held.setdefault(holder, {})[name[len(holder) + 1 :] if holder else name] = entry
    wanted = {_plain(name) for name in model.shapes}
    scores = {holder: sum(_plain(name) in wanted for name in names) for holder, names in held.items()}
    best = max(scores.values(), default=0)
    if best == 0:
        return list(held.values())
    fitting = [holder for holder, score in scores.items() if score]
    by_value = sorted(fitting, key=lambda holder: (-_holds(model, _by_plain(model, held[holder])), -scores[holder]))
    return [held[by_value[0]]] if len(held) > 1 else [held[holder] for holder in fitting]


def _renamed(model: LoadedModel, names: dict[str, TensorEntry], is_loaded: bool) -> dict[str, TensorEntry]:
    """The same tensors under the model's names, if it holds their values there; else as they are."""
    if not is_loaded or len(names.keys() & model.shapes.keys()) == len(names):
        return names
    plain = _by_plain(model, names)
    if _holds(model, plain):
        return plain
    for place in _places(model, names):
        below = {place + name: entry for name, entry in names.items()}
        if _holds(model, below):
            return below
    theirs, ours = prefixes(model.shapes, {name: entry.whole_shape for name, entry in names.items()})
    moved = {
        ours + name.removeprefix(theirs) if name.startswith(theirs) else name: entry for name, entry in names.items()
    }
    return moved if _holds(model, moved) else names


def _places(model: LoadedModel, names: Mapping[str, TensorEntry]) -> list[str]:
    """Prefixes of modules of the model that have all the names and shapes of a file."""
    first = next(iter(names))
    places = [name.removesuffix(first) for name in model.shapes if name.endswith(f".{first}")][:_MAX_PLACES]
    return [
        place
        for place in places
        if all(model.shapes.get(place + name) == entry.whole_shape for name, entry in names.items())
    ]


def _by_plain(model: LoadedModel, names: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors under the model's names, where only wrappers around modules differ."""
    ours = {_plain(name): name for name in model.shapes}
    return {name if name in model.shapes else ours.get(_plain(name), name): entry for name, entry in names.items()}


def _plain(name: str) -> str:
    """A name without the parts that wrappers and adapters insert."""
    name = _WRAPPERS.sub("", name)
    return _ADAPTER_PART.sub(r"\1", name) if IS_ADAPTER.search(name) else name


def _holds(model: LoadedModel, names: Mapping[str, TensorEntry]) -> bool:
    """Whether the model has the values of most tensors that can tell it: zeros and ones are in every model."""
    same = other = 0
    for name, entry in names.items():
        held = model.state.get(name)
        if held is None or held.is_meta or held.shape != entry.shape or held.numel() < 2:
            continue
        if same + other >= _MAX_CHECKED:
            break
        try:
            values = load(entry)
        except (DamagedFile, OSError):
            continue
        if not values.dtype.is_floating_point or is_constant(values):
            continue
        if is_equal(values, held):
            same += 1
        else:
            other += 1
    return same > other


def adapter_shapes(model: LoadedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's adapters alone."""
    return {name: shape for name, shape in model.shapes.items() if IS_ADAPTER.search(name)}
