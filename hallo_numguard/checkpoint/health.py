"""Whether the values of a checkpoint are those of a healthy run."""

from __future__ import annotations

from pathlib import Path

from hallo_numguard.checkpoint.names import is_listed
from hallo_numguard.checkpoint.readers import UnknownLayout, open_source
from hallo_numguard.checkpoint.scan import scan
from hallo_numguard.checkpoint.verify import verify_manifest

_OURS = {"code"}  # kinds of findings that are about who wrote a file: this run did


def illness(folder: Path) -> str | None:
    """Returns what is wrong with the checkpoint in a folder; None if nothing is.

    Cost: every file is read twice.
    """
    return changed(folder) or _bad_values(folder)


def changed(folder: Path) -> str | None:
    """Returns how a folder differs from its manifest; None if it does not. Every file is read once."""
    report = verify_manifest(folder)
    problems = [finding.message for finding in report.findings if finding.severity != "info"]
    return "; ".join(problems[:3] or report.unchecked) or None


def _bad_values(folder: Path) -> str | None:
    sources = _sources(folder)
    if not sources:
        return "no file in it is of a layout that can be read, so its values are not known"
    report = scan(*sources)
    problems = [
        finding.message for finding in report.findings if finding.severity == "error" and finding.kind not in _OURS
    ]
    return "; ".join(problems[:3] or report.unchecked) or None


def _sources(folder: Path) -> list[Path]:
    """The folder itself if a reader knows it as a whole, else those of its files that hold tensors."""
    if _is_known(folder):
        return [folder]
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if is_listed(path.relative_to(folder).as_posix()) and _is_known(path)]


def _is_known(path: Path) -> bool:
    try:
        open_source(path)
    except UnknownLayout:
        return False
    return True
