"""DeepSpeed universal checkpoints: a folder per parameter, with one file for its values and one for each moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.file_access import read_tag
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged, joined, role_of
from hallo_numguard.files.formats.torch_zip import named_tensors, open_archive

LAYOUT = "deepspeed universal"
_LATEST = "latest_universal"
_PARAMETERS = "zero"
_TENSORS = ("fp32", "exp_avg", "exp_avg_sq")
_MAX_NAMES = 5  # in a message
_REMEDY = "Convert the checkpoint again (ds_to_universal.py), or copy the whole folder."


def recognises(path: Path) -> bool:
    """Returns whether the path is the folder of a tag, or the folder above with the file that names the latest tag."""
    return (path / _LATEST).is_file() or next(path.glob(f"{_PARAMETERS}/*/*.pt"), None) is not None


def read(path: Path) -> Source:
    """Returns the values and moments of all parameters."""
    try:
        folder = _tag_folder(path)
    except DamagedFile as error:
        return damaged(LAYOUT, path / _LATEST, error)
    files = sorted((folder / _PARAMETERS).glob("*/*.pt"))
    whole = joined(LAYOUT, path, map(_read, files), tag=folder.name)
    return replace(whole, findings=(*whole.findings, *_missing(folder, files)), parts=())


def _missing(folder: Path, files: Sequence[Path]) -> Iterator[Finding]:
    """Parameters without a folder, and folders without a file that the others have."""
    held: dict[str, set[str]] = {}
    for file in files:
        if file.stem in _TENSORS:
            held.setdefault(file.parent.name, set()).add(file.stem)
    lost = sorted(_parameters(folder) - held.keys()) if held else []
    if lost:
        message = (
            f"{folder.name}: there is no folder for {', '.join(lost[:_MAX_NAMES])}, and the model has such weights"
        )
        yield _finding(message, lost[0], folder)
    common = Counter(name for names in held.values() for name in names)
    usual = {name for name, count in common.items() if 2 * count > len(held)}
    for parameter, names in held.items():
        is_frozen = names == {"fp32"}  # it never had moments
        for name in sorted(usual - names if not is_frozen else ()):
            yield _finding(f"{folder.name}: {parameter} has no {name}.pt, and the others have one", parameter, folder)


def _finding(message: str, name: str, folder: Path) -> Finding:
    return Finding("missing_shard", message, name=name, severity="error", file=str(folder), remedy=_REMEDY)


def _parameters(folder: Path) -> set[str]:
    """Names of the parameters in the file with the model's state."""
    for file in sorted(folder.glob("*mp_rank_*_model_states.pt")):
        try:
            value = open_archive(file).value
        except DamagedFile:
            continue
        groups = value.get("param_shapes") if isinstance(value, Mapping) else None
        if isinstance(groups, (list, tuple)):
            return {name for group in groups if isinstance(group, Mapping) for name in group if isinstance(name, str)}
    return set()


def _tag_folder(path: Path) -> Path:
    """The folder of the latest tag, or the path itself if no file names one."""
    latest = path / _LATEST
    if not latest.is_file():
        return path
    tag = read_tag(latest)
    if not (path / tag / _PARAMETERS).is_dir():
        raise DamagedFile(f"names {tag}, but there is no such checkpoint", kind="missing")
    return path / tag


def _read(file: Path) -> Source:
    """One file: its folder is named after the parameter, the file after the role."""
    try:
        archive = open_archive(file)
        role = role_of(file.stem)
        entries = [archive.entry(file.parent.name, role, tensor) for _, tensor in named_tensors(archive.value)]
    except DamagedFile as error:
        return damaged(LAYOUT, file, error)
    return archive.source(LAYOUT, entries, {})
