"""Telling what has become of a folder since its manifest was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hallo_numguard.core.findings import Finding, PreflightReport, by_severity
from hallo_numguard.files.manifest import checksums, hub, statement
from hallo_numguard.files.manifest.changes import changes
from hallo_numguard.files.manifest.facts import Progress, read_digests, read_folder
from hallo_numguard.files.manifest.file_names import MANIFEST, SUMS, TENSORS, flaw, is_listed
from hallo_numguard.files.manifest.listing import DamagedManifest, Listing, read_bytes
from hallo_numguard.files.manifest.statement import ALGORITHM, Contents, FileContents
from hallo_numguard.files.manifest.tree import Tree, walk

_INTACT = "Go back to an intact copy: download it again, or take another checkpoint."
_NAMES = (
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
"""What a manifest may be called, the strongest first."""

_NONE = Listing("", ALGORITHM, {}, complete=False)


def verify_manifest(
    folder: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Compares a folder with its manifest.

    Args:
        folder: With the files.
        manifest: File that says what they should be: one that `write_manifest` wrote, or a list of checksums as
            sha256sum, md5sum and their BSD kin write. Left out, it is looked for in the folder.
        progress: Called with the number of bytes just read and of all bytes, by several threads.

    Returns:
        A finding for each file that is missing, extra or changed, and for each tensor that differs in a changed one.
        Where the Hugging Face cache has the digests that the Hub gave, files are compared with these too.

    Raises:
        InvalidInput: If it is no folder, or cannot be listed.

    Cost: every file is read once, changed ones once more.
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
        return PreflightReport((_damaged(str(error)), *tree.findings), unchecked=("No file was compared.",))
    etags = hub.etags(root, tree.files)
    if not listing.digests and not etags:
        nothing = f"{root} has no manifest; `hallo-numguard manifest` writes one."
        return PreflightReport(by_severity([*tree.findings]), unchecked=(nothing,))
    return _compare(root, tree, listing, contents, etags, progress)


def _listing(root: Path, manifest: Path | None) -> Listing:
    """What the manifest says; nothing if there is none."""
    if manifest is None:
        manifest = next((root / name for name in _NAMES if os.path.lexists(root / name)), None)
    if manifest is None:
        return _NONE
    data = read_bytes(manifest)
    if manifest.suffix == ".json":
        return statement.read_files(data, manifest.name)
    return checksums.read(data, manifest.name)


def _contents(tree: Tree, listing: Listing) -> Contents | None:
    """What the files should hold; None where nobody knows, which includes that it is known but was altered."""
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
    """Checks that the list of checksums, for those who have no other tool, says what the manifest says."""
    sums = root / SUMS[ALGORITHM]
    if listing.source != MANIFEST or not sums.is_file():
        return
    if read_bytes(sums) != checksums.write(listing.digests):
        raise DamagedManifest(f"{sums.name} and {MANIFEST} should say the same, one of them was altered")


def _damaged(cause: str) -> Finding:
    remedy = "Get the manifest from where it was written. If you trust the files themselves, write it anew."
    return Finding("damaged_manifest", cause, severity="error", remedy=remedy)


def _compare(
    root: Path,
    tree: Tree,
    listing: Listing,
    contents: Contents | None,
    etags: Mapping[str, str],
    progress: Progress | None,
) -> PreflightReport:
    missing = [name for name in listing.digests if name not in tree.files]
    known = listing.digests.keys() | {name for name, etag in etags.items() if hub.needs_sha256(etag)}
    named = {name: path for name, path in tree.files.items() if name in known or missing}
    algorithms = sorted({listing.algorithm, ALGORITHM}) if etags else [listing.algorithm]
    digests, unreadable = read_digests(named, algorithms, progress)
    found = digests[listing.algorithm]
    changed = [name for name, digest in found.items() if listing.digests.get(name, digest) != digest]
    before = {name: contents.files[name] for name in changed if name in contents.files} if contents else {}
    findings = [
        *tree.findings,
        *unreadable,
        *_bad_names(listing),
        *_missing(missing, listing, found),
        *_extra(tree, listing),
        *_links(tree, listing),
        *(_changed(name, listing, found[name]) for name in changed),
        *_changed_contents(root, tree, before),
        *hub.unlike_hub(etags, tree.files, digests.get(ALGORITHM, {}), found.keys() & listing.digests.keys() - changed),
    ]
    compared = sum(name in listing.digests or name in etags for name in tree.files)
    sources = " and ".join(filter(None, (listing.source, "the digests that the Hub gave" if etags else "")))
    return PreflightReport(by_severity(findings), (f"{compared} files were compared with {sources}.",))


def _bad_names(listing: Listing) -> Iterator[Finding]:
    for name in listing.digests:
        why = flaw(name) or ("no manifest lists" if listing.complete and not is_listed(name) else "")
        if why:
            message = f"{listing.source} names {name}, which {why}; no such file was looked at"
            yield Finding("bad_name", message, severity="error", file=name)


def _missing(missing: list[str], listing: Listing, digests: Mapping[str, str]) -> Iterator[Finding]:
    elsewhere = {digest: name for name, digest in digests.items() if name not in listing.digests}
    for name in missing:
        moved = elsewhere.get(listing.digests[name])
        message = f"{name} is missing" + (f"; {moved} holds what it held" if moved else "")
        remedy = f"Rename {moved} back." if moved else _INTACT
        yield Finding("missing_file", message, severity="error", file=name, remedy=remedy)


def _extra(tree: Tree, listing: Listing) -> Iterator[Finding]:
    """Findings about files that nothing is said of. Only a manifest of ours claims to name all."""
    if not listing.digests:
        return
    severity = "warning" if listing.complete else "info"
    for name in tree.files:
        if name in listing.digests:
            continue
        message = f"{name} is there, but {listing.source} does not name it"
        yield Finding("extra_file", message, severity=severity, file=name, remedy="Delete it, if nobody needs it.")


def _links(tree: Tree, listing: Listing) -> Iterator[Finding]:
    if listing.complete and listing.links != bool(tree.linked):
        words = {True: "some", False: "none"}
        message = (
            f"{listing.source} says that {words[listing.links]} of the files are reached through links, "
            f"got {words[bool(tree.linked)]}"
        )
        remedy = "If you copied the files out of a cache on purpose, write the manifest anew."
        yield Finding("changed_links", message, file=listing.source, remedy=remedy)


def _changed(name: str, listing: Listing, digest: str) -> Finding:
    message = f"{name} was changed: its {listing.algorithm} should be {listing.digests[name]}, got {digest}"
    return Finding("changed_file", message, severity="error", file=name, remedy=_INTACT)


def _changed_contents(root: Path, tree: Tree, before: Mapping[str, FileContents]) -> Iterator[Finding]:
    """Findings about what is in files that were changed, beside the bytes."""
    if not before:
        return
    facts = read_folder(root, {name: tree.files[name] for name in before}, ())
    yield from (finding for finding in facts.findings if finding.file in before)
    for name, contents in before.items():
        if name in facts.contents:
            yield from changes(name, contents, facts.contents[name])
