"""Whether the values of a checkpoint are those of a healthy run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.files.formats import UnknownLayout, open_source
from hallo_numguard.files.manifest.file_names import is_listed
from hallo_numguard.files.manifest.verify import verify_manifest
from hallo_numguard.files.scan.scan import scan

_OURS = {"code"}  # kinds of findings that are about who wrote a file: this run did
_MOST = 3  # sentences


def illness(folder: Path) -> str | None:
    """Returns what is wrong with the checkpoint in a folder; None if nothing is.

    Cost: every file is read twice.
    """
    return changed(folder) or _bad_values(folder)


def changed(folder: Path) -> str | None:
    """Returns how a folder differs from its manifest; None if it does not. Every file is read once."""
    try:
        report = verify_manifest(folder)
    except (InvalidInput, OSError) as error:
        return harmless(str(error))
    return _in_words([finding for finding in report.findings if finding.severity != "info"], report)


def _bad_values(folder: Path) -> str | None:
    sources = _sources(folder)
    if not sources:
        return "no file in it is of a layout that can be read, so its values are not known"
    report = scan(*sources)
    return _in_words(
        [finding for finding in report.findings if finding.severity == "error" and finding.kind not in _OURS], report
    )


def _in_words(problems: Sequence[Finding], report: PreflightReport) -> str | None:
    """The first problems, else what could not be looked at; None if all is well. Names in it are made harmless."""
    sentences = [finding.message for finding in problems[:_MOST]] or list(report.unchecked[:_MOST])
    return "; ".join(map(harmless, sentences)) or None


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
