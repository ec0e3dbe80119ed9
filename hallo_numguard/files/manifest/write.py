"""Writing the manifest of a folder: the digests of its files, and what is in them, tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.findings import PreflightReport, by_severity
from hallo_numguard.files.manifest import checksums, statement
from hallo_numguard.files.manifest.facts import FolderFacts, Progress, read_folder
from hallo_numguard.files.manifest.file_names import MANIFEST, SUMS, TENSORS, in_order
from hallo_numguard.files.manifest.listing import Listing
from hallo_numguard.files.manifest.statement import ALGORITHM, Contents
from hallo_numguard.files.manifest.tree import Tree, walk


def write_manifest(
    folder: str | os.PathLike[str], md5: bool = False, progress: Progress | None = None
) -> PreflightReport:
    """Writes the manifest of a folder into it: SHA256SUMS, numguard.manifest.json and numguard.tensors.json.

    `sha256sum -c SHA256SUMS` checks the first without this package. What is not finite in the files is no matter here,
    it is written down.

    Args:
        folder: Of a model or of a checkpoint. Links are followed inside of it, and into the blobs of the Hugging Face
            cache.
        md5: Also write MD5SUMS. One that is there already is always written anew.
        progress: Called with the number of bytes just read and of all bytes, by several threads.

    Returns:
        What was written. With an error among its findings (a link that leads out, a pipe, names that differ in case
        only, a file that cannot be read) nothing was, for the manifest would not be of the whole folder.

    Raises:
        InvalidInput: If it is no folder, or cannot be listed.
        OSError: If a file of the manifest cannot be written. Each of them is old or new then, and whole.

    Cost: every file is read once.
    """
    root = Path(folder)
    tree = walk(root)
    md5 = md5 or (root / SUMS["md5"]).is_file()
    facts = read_folder(root, tree.without(TENSORS), (ALGORITHM, "md5") if md5 else (ALGORITHM,), progress)
    findings = by_severity([*tree.findings, *facts.findings])
    if any(finding.severity == "error" for finding in findings):
        return PreflightReport(findings, unchecked=("No manifest was written, for it would not be of all files.",))
    for name, data in _documents(root, tree, facts).items():
        write_whole(root / name, data)
    return PreflightReport(findings, (f"A manifest was written of {facts.in_words()}.",))


def _documents(root: Path, tree: Tree, facts: FolderFacts) -> dict[str, bytes]:
    """The manifest's files in the order in which they are to be written: what names others comes after them."""
    model = Path(os.path.abspath(root)).name  # noqa: PTH100 - resolve() would give the name that a link points to
    digests = facts.digests
    contents = statement.write_contents(
        Contents(model, statement.root_digest(digests[ALGORITHM].values()), facts.contents)
    )
    listed = {
        algorithm: _with(of_files, TENSORS, hashlib.new(algorithm, contents, usedforsecurity=False).hexdigest())
        for algorithm, of_files in digests.items()
    }
    sums = {SUMS[algorithm]: checksums.write(of_files) for algorithm, of_files in listed.items()}
    listing = Listing(MANIFEST, ALGORITHM, listed[ALGORITHM], complete=True, model=model, links=bool(tree.linked))
    return {TENSORS: contents, **sums, MANIFEST: statement.write_files(listing)}


def _with(digests: Mapping[str, str], name: str, digest: str) -> dict[str, str]:
    """The digests with one more, in the order of their names."""
    more = {**digests, name: digest}
    return {name: more[name] for name in sorted(more, key=in_order)}
