"""Whether a checkpoint on disk is healthy: its bytes against the manifest, and its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport
from hallo_numguard.core.safe_text import harmless
from hallo_numguard.files.formats.torch_zip import UP_TO_CLASSES
from hallo_numguard.files.manifest.facts import sources
from hallo_numguard.files.manifest.tree import walk
from hallo_numguard.files.manifest.verify import verify_manifest
from hallo_numguard.files.scan.scan import scan_opened

_TRUSTED_KINDS = {"code"}  # findings about who wrote a file: this run did
_MAX_SENTENCES = 3


def health_problem(folder: Path) -> str | None:
    """Returns the problem of the checkpoint in a folder, or None. Reads every file twice."""
    return manifest_problem(folder) or _value_problem(folder)


def manifest_problem(folder: Path) -> str | None:
    """Returns the difference between a folder and its manifest, or None. Reads every file once."""
    try:
        report = verify_manifest(folder)
    except (InvalidInput, OSError) as error:
        return harmless(str(error))
    return _in_words([finding for finding in report.findings if finding.severity != "info"], report)


def _value_problem(folder: Path) -> str | None:
    opened = list(sources(folder, walk(folder).files.values()))
    if not opened:
        return "no file in it has a layout that can be read, so its values are unknown"
    report = scan_opened(opened)
    errors = [item for item in report.findings if item.severity == "error" and item.kind not in _TRUSTED_KINDS]
    unchecked = tuple(sentence for sentence in report.unchecked if UP_TO_CLASSES not in sentence)  # classes of this run
    return _in_words(errors, replace(report, unchecked=unchecked))


def _in_words(problems: Sequence[Finding], report: PreflightReport) -> str | None:
    """The first problems, else what could not be checked, with names made harmless; None without any."""
    sentences = [finding.message for finding in problems[:_MAX_SENTENCES]] or list(report.unchecked[:_MAX_SENTENCES])
    return "; ".join(map(harmless, sentences)) or None
