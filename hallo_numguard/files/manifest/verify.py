"""Compares a folder with its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hallo_numguard.core.findings import Finding, PreflightReport, by_severity, merge
from hallo_numguard.files.formats import UnknownLayout, open_source
from hallo_numguard.files.manifest import statement
from hallo_numguard.files.manifest.changes import changes
from hallo_numguard.files.manifest.facts import Progress, read_folder
from hallo_numguard.files.manifest.listing import (
    MANIFEST,
    SUMS,
    TENSORS,
    DamagedManifest,
    Listing,
    invalid_reason,
    is_listed,
    read_bytes,
    read_checksums,
    write_checksums,
)
from hallo_numguard.files.manifest.statement import ALGORITHM, Contents, FileContents
from hallo_numguard.files.manifest.tree import Tree, hub_etags, hub_mismatches, is_sha256, walk

_INTACT_REMEDY = "Go back to an intact copy: download it again, or take another checkpoint."
_MANIFEST_NAMES = (  # the strongest first
    MANIFEST,
    "SHA512SUMS",
    "SHA384SUMS",
    "SHA256SUMS",
    "sha256sums.txt",
    "SHA224SUMS",
    "SHA1SUMS",
    "MD5SUMS",
    "md5sums.txt",
)
_NO_LISTING = Listing("", ALGORITHM, {}, complete=False)


def verify_manifest(
    folder: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Compares a folder with its manifest. Reads every file once, and changed files once more.

    Args:
        folder: Folder with the files.
        manifest: Manifest written by `write_manifest`, or a list of checksums from sha256sum, md5sum or their BSD
            counterparts (default: the one in the folder).
        progress: Called by several threads with the number of bytes just read, and the total.

    Returns:
        Report with a finding for each file that is missing, extra or changed, and for each tensor that differs in a
        changed one. Files are also compared with the digests in the Hugging Face cache, if there are any.

    Raises:
        InvalidInput: If it is no folder, or cannot be listed.
    """
    root = Path(folder)
    tree = walk(root)
    try:
        listing = _listing(root, None if manifest is None else Path(manifest))
        if not listing.complete:
            tree = walk(root, also=listing.digests)
        contents = _contents(tree, listing)
        _check_sums(root, listing)
    except DamagedManifest as error:
        remedy = "Get the manifest from where it was written. If you trust the files themselves, write a new one."
        damage = Finding("damaged_manifest", str(error), severity="error", remedy=remedy)
        return PreflightReport((damage, *tree.findings), unchecked=("No file was compared.",))
    etags = hub_etags(root, tree.files)
    if not listing.digests and not etags:
        reason = f"{root} has no manifest; `hallo-numguard manifest` writes one."
        return PreflightReport(by_severity([*tree.findings]), unchecked=(reason,))
    compared = _compare(root, tree, listing, contents, etags, progress)
    return compared if listing.digests else merge([compared, PreflightReport(_missing_shards(root))])


def _missing_shards(root: Path) -> tuple[Finding, ...]:
    """Shards that an index of the folder names: without a manifest nothing else says that they belong to it."""
    try:
        found = open_source(root).findings
    except UnknownLayout:
        return ()
    return tuple(replace(one, file=os.path.relpath(one.file, root)) for one in found if one.kind == "missing_shard")


def _listing(root: Path, manifest: Path | None) -> Listing:
    """The files in the manifest; none if there is no manifest."""
    if manifest is None:
        manifest = next((root / name for name in _MANIFEST_NAMES if os.path.lexists(root / name)), None)
    if manifest is None:
        return _NO_LISTING
    data = read_bytes(manifest)
    if manifest.suffix == ".json":
        return statement.read_files(data, manifest.name)
    return read_checksums(data, manifest.name)


def _contents(tree: Tree, listing: Listing) -> Contents | None:
    """The content that files should have; None if it is unknown, or was altered (which is a changed file)."""
    path, digest = tree.files.get(TENSORS), listing.digests.get(TENSORS)
    if path is None or digest is None:
        return None
    data = read_bytes(path)
    if hashlib.new(listing.algorithm, data, usedforsecurity=False).hexdigest() != digest:
        return None
    contents = statement.read_contents(data)
    if listing.model and contents.model != listing.model:
        raise DamagedManifest(f"{listing.source} and {TENSORS} should name the same model, one of them was altered")
    return contents


def _check_sums(root: Path, listing: Listing) -> None:
    """Checks that SHA256SUMS, for users of sha256sum, agrees with our manifest."""
    sums = root / SUMS[ALGORITHM]
    if listing.source != MANIFEST or not sums.is_file():
        return
    if read_bytes(sums) != write_checksums(listing.digests):
        raise DamagedManifest(f"{sums.name} and {MANIFEST} should say the same, one of them was altered")


def _compare(
    root: Path,
    tree: Tree,
    listing: Listing,
    contents: Contents | None,
    etags: Mapping[str, str],
    progress: Progress | None,
) -> PreflightReport:
    missing = [name for name in listing.digests if name not in tree.files]
    known = listing.digests.keys() | {name for name, etag in etags.items() if is_sha256(etag)}
    # With files missing, all others are read: one of them may be a missing one under another name.
    files = {name: path for name, path in tree.files.items() if name in known or missing}
    algorithms = sorted({listing.algorithm, ALGORITHM}) if etags else [listing.algorithm]
    facts = read_folder(root, files, algorithms, progress, tensors=False)
    found = facts.digests[listing.algorithm]
    changed = [name for name, digest in found.items() if listing.digests.get(name, digest) != digest]
    before = {name: contents.files[name] for name in changed if name in contents.files} if contents else {}
    unchanged = found.keys() & listing.digests.keys() - changed
    findings = [
        *tree.findings,
        *facts.findings,
        *_bad_names(listing),
        *_missing(missing, listing, found),
        *_extra(tree, listing),
        *_links(tree, listing),
        *(_changed(name, listing, found[name]) for name in changed),
        *_changed_contents(root, tree, before),
        *hub_mismatches(etags, tree.files, facts.digests.get(ALGORITHM, {}), unchanged),
    ]
    compared = sum(name in listing.digests or name in etags for name in tree.files)
    sources = " and ".join(filter(None, (listing.source, "the Hub's digests" if etags else "")))
    return PreflightReport(by_severity(findings), (f"{compared} files were compared with {sources}.",))


def _bad_names(listing: Listing) -> Iterator[Finding]:
    for name in listing.digests:
        reason = invalid_reason(name) or ("no manifest lists" if listing.complete and not is_listed(name) else "")
        if reason:
            message = f"{listing.source} names {name}, which {reason}; no such file was opened"
            yield Finding("bad_name", message, severity="error", file=name)


def _missing(missing: list[str], listing: Listing, digests: Mapping[str, str]) -> Iterator[Finding]:
    unlisted = {digest: name for name, digest in digests.items() if name not in listing.digests}
    for name in missing:
        renamed = unlisted.get(listing.digests[name])
        message = f"{name} is missing" + (f"; {renamed} has its content" if renamed else "")
        remedy = f"Rename {renamed} back." if renamed else _INTACT_REMEDY
        yield Finding("missing_file", message, severity="error", file=name, remedy=remedy)


def _extra(tree: Tree, listing: Listing) -> Iterator[Finding]:
    """Files that are not listed: information only, unless the manifest claims to list all."""
    if not listing.digests:
        return
    severity = "warning" if listing.complete else "info"
    for name in tree.files:
        if name not in listing.digests:
            message = f"{name} is not in {listing.source}"
            yield Finding("extra_file", message, severity=severity, file=name, remedy="Delete it if it is not needed.")


def _links(tree: Tree, listing: Listing) -> Iterator[Finding]:
    if listing.complete and listing.links != bool(tree.linked):
        words = {True: "some", False: "none"}
        message = (
            f"{listing.source} says that {words[listing.links]} of the files are reached through links, "
            f"got {words[bool(tree.linked)]}"
        )
        remedy = "If you copied the files out of a cache on purpose, write a new manifest."
        yield Finding("changed_links", message, file=listing.source, remedy=remedy)


def _changed(name: str, listing: Listing, digest: str) -> Finding:
    message = f"{name} was changed: its {listing.algorithm} should be {listing.digests[name]}, got {digest}"
    return Finding("changed_file", message, severity="error", file=name, remedy=_INTACT_REMEDY)


def _changed_contents(root: Path, tree: Tree, before: Mapping[str, FileContents]) -> Iterator[Finding]:
    """Size and tensors of changed files, compared with those in the manifest."""
    if not before:
        return
    facts = read_folder(root, {name: tree.files[name] for name in before}, ())
    yield from (finding for finding in facts.findings if finding.file in before)
    for name, contents in before.items():
        if name in facts.contents:
            yield from changes(name, contents, facts.contents[name])
