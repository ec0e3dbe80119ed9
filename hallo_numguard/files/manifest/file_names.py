"""Names of the files of a manifest, as every format that we write has them. Standard library only."""

from __future__ import annotations

import re

MANIFEST = "numguard.manifest.json"
TENSORS = "numguard.tensors.json"
SUMS = {"sha256": "SHA256SUMS", "md5": "MD5SUMS"}
SIGNATURE = "model.sig"
DOWNLOADS = ".cache/huggingface"

UNLISTED = (".git", ".gitattributes", ".github", ".gitignore", DOWNLOADS, MANIFEST, *SUMS.values())
"""Files and folders below the root that no manifest lists: itself, and what changes while the model does not."""

_LEFT_OVER = re.compile(r"\.(?:numguard\.\w+\.json|SHA256SUMS|MD5SUMS)\.\d+\.[0-9a-f]{8}")


def is_listed(name: str) -> bool:
    """Whether a manifest of ours lists the file or folder with this name."""
    return not name.endswith(".sig") and not any(f"{name}/".startswith(f"{other}/") for other in UNLISTED)


def is_left_over(name: str) -> bool:
    """Whether this is a file that we were writing when we were killed."""
    return _LEFT_OVER.fullmatch(name) is not None


def in_order(name: str) -> list[str]:
    """Key to sort names by: part by part, as pathlib does, so that `sub/a` comes before `sub.txt`."""
    return name.split("/")


def flaw(name: str) -> str:
    """What is wrong with a name that a manifest gives, "" if nothing: it must stay below the root."""
    parts = name.split("/")
    if not name or "\0" in name:
        return "is no name of a file"
    if name.startswith("/"):
        return "is absolute"
    if ".." in parts:
        return "leads out of the folder"
    return "is not in its shortest form" if "" in parts or "." in parts else ""


def title(name: str, role: str, rank: int | None) -> str:
    """Returns what a tensor, or the piece of one that a rank has saved, is called in a sentence."""
    of = name if role in ("parameter", "buffer") else f"{role} of {name}"
    return of if rank is None else f"{of} (rank {rank})"
