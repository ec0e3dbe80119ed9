"""DeepSpeed's universal checkpoints: a folder a parameter, with a file for its values and each of its moments."""

from __future__ import annotations

from pathlib import Path

from hallo_numguard.files.formats import torch_zip
from hallo_numguard.files.formats.file_access import check_inside, tag_in
from hallo_numguard.files.formats.source import DamagedFile, Source, damaged, joined, role_of

LAYOUT = "deepspeed universal"
_LATEST = "latest_universal"
_PARAMETERS = "zero"


def recognises(path: Path) -> bool:
    """Returns whether it is the folder of a tag, or the one above with the file that names the latest tag."""
    return (path / _LATEST).is_file() or next(path.glob(f"{_PARAMETERS}/*/*.pt"), None) is not None


def read(path: Path) -> Source:
    """Returns the values and moments of all parameters."""
    try:
        folder = _folder(path)
    except DamagedFile as error:
        return damaged(LAYOUT, path / _LATEST, error)
    parts = [_read(file, folder) for file in sorted((folder / _PARAMETERS).glob("*/*.pt"))]
    return joined(LAYOUT, path, parts, tag=folder.name)


def _folder(path: Path) -> Path:
    """The folder of the tag that the file names, or the path itself if there is no such file."""
    latest = path / _LATEST
    if not latest.is_file():
        return path
    tag = tag_in(latest)
    if not (path / tag / _PARAMETERS).is_dir():
        raise DamagedFile(f"names {tag}, and there is no such checkpoint", kind="missing")
    check_inside(path / tag, path)
    return path / tag


def _read(file: Path, root: Path) -> Source:
    """One file: the parameter's name is that of its folder, the role that of the file."""
    try:
        check_inside(file, root)
        archive = torch_zip.open_archive(file)
        entries = [
            archive.entry(file.parent.name, role_of(file.stem), tensor)
            for _, tensor in torch_zip.named_tensors(archive.value)
        ]
    except DamagedFile as error:
        return damaged(LAYOUT, file, error)
    return archive.source(LAYOUT, entries, {})
