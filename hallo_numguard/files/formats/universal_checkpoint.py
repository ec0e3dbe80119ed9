"""DeepSpeed universal checkpoints: a folder per parameter, with one file for its values and one for each moment."""

from __future__ import annotations

from pathlib import Path

from hallo_numguard.files.formats.file_access import read_tag
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged, joined, role_of
from hallo_numguard.files.formats.torch_zip import named_tensors, open_archive

LAYOUT = "deepspeed universal"
_LATEST = "latest_universal"
_PARAMETERS = "zero"


def recognises(path: Path) -> bool:
    """Returns whether the path is the folder of a tag, or the folder above with the file that names the latest tag."""
    return (path / _LATEST).is_file() or next(path.glob(f"{_PARAMETERS}/*/*.pt"), None) is not None


def read(path: Path) -> Source:
    """Returns the values and moments of all parameters."""
    try:
        folder = _tag_folder(path)
    except DamagedFile as error:
        return damaged(LAYOUT, path / _LATEST, error)
    parts = [_read(file, folder) for file in sorted((folder / _PARAMETERS).glob("*/*.pt"))]
    return joined(LAYOUT, path, parts, tag=folder.name)


def _tag_folder(path: Path) -> Path:
    """The folder of the latest tag, or the path itself if no file names one."""
    latest = path / _LATEST
    if not latest.is_file():
        return path
    tag = read_tag(latest)
    if not (path / tag / _PARAMETERS).is_dir():
        raise DamagedFile(f"names {tag}, but there is no such checkpoint", kind="missing")
    return path / tag


def _read(file: Path, root: Path) -> Source:
    """One file: its folder is named after the parameter, the file after the role."""
    try:
        archive = open_archive(file)
        role = role_of(file.stem)
        entries = [archive.entry(file.parent.name, role, tensor) for _, tensor in named_tensors(archive.value)]
    except DamagedFile as error:
        return damaged(LAYOUT, file, error)
    return archive.source(LAYOUT, entries, {})
