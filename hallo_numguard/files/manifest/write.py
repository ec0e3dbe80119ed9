"""Writes the manifest of a folder: digests of its files, and facts about the tensors in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.findings import PreflightReport, by_severity
from hallo_numguard.files.manifest import statement
from hallo_numguard.files.manifest.facts import FolderFacts, Progress, read_folder
from hallo_numguard.files.manifest.listing import MANIFEST, SUMS, TENSORS, Listing, path_order, write_checksums
from hallo_numguard.files.manifest.statement import ALGORITHM, Contents
from hallo_numguard.files.manifest.tree import Tree, walk


def write_manifest(
    folder: str | os.PathLike[str], md5: bool = False, progress: Progress | None = None
) -> PreflightReport:
    """Writes the manifest of a folder into it: SHA256SUMS, numguard.manifest.json and numguard.tensors.json.

    `sha256sum -c SHA256SUMS` checks the first without this package. Non-finite values are recorded, not judged. Every
    file is read once.

    Args:
        folder: Folder of a model or checkpoint. Links are followed inside of it, and into the blobs of the Hugging Face
            cache.
        md5: Whether to write MD5SUMS too. An existing one is always updated.
        progress: Called by several threads with the number of bytes just read, and the total.

    Returns:
        Report about the written files. If it has an error (a link that leads outside, a pipe, names that differ in case
        only, a file that cannot be read), nothing was written, because the manifest would be incomplete.

    Raises:
        InvalidInput: If it is no folder, or cannot be listed.
        OSError: If a file of the manifest cannot be written. Each file is then either the old or the new one.
    """
    root = Path(folder)
    tree = walk(root)
    md5 = md5 or (root / SUMS["md5"]).is_file()
    files = {name: path for name, path in tree.files.items() if name != TENSORS}
    facts = read_folder(root, files, (ALGORITHM, "md5") if md5 else (ALGORITHM,), progress)
    findings = by_severity([*tree.findings, *facts.findings])
    if any(finding.severity == "error" for finding in findings):
        return PreflightReport(findings, unchecked=("No manifest was written: it would not list all files.",))
    for name, data in _documents(root, tree, facts).items():
        write_whole(root / name, data)
    return PreflightReport(findings, (f"Wrote a manifest of {facts.summary()}.",))


def _documents(root: Path, tree: Tree, facts: FolderFacts) -> dict[str, bytes]:
    """Content of the manifest's files by name, each after the ones that it lists."""
    model = Path(os.path.abspath(root)).name  # noqa: PTH100 - resolve() would follow a link
    digests = facts.digests
    root_digest = statement.root_digest(digests[ALGORITHM].values())
    contents = statement.write_contents(Contents(model, root_digest, facts.contents))
    listed = {}
    for algorithm, by_name in digests.items():
        own = hashlib.new(algorithm, contents, usedforsecurity=False).hexdigest()
        listed[algorithm] = dict(sorted({**by_name, TENSORS: own}.items(), key=lambda item: path_order(item[0])))
    sums = {SUMS[algorithm]: write_checksums(by_name) for algorithm, by_name in listed.items()}
    listing = Listing(MANIFEST, ALGORITHM, listed[ALGORITHM], complete=True, model=model, links=bool(tree.linked))
    return {TENSORS: contents, **sums, MANIFEST: statement.write_files(listing)}
