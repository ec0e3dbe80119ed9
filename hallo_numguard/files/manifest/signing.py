"""Signatures of a folder, made and checked by model-signing (OpenSSF): there is no cryptography in this package."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.errors import BackendUnavailable, InvalidInput, NumGuardError
from hallo_numguard.core.findings import Finding, PreflightReport
from hallo_numguard.files.manifest.listing import HUB_DOWNLOADS, SIGNATURE


class SigningFailed(NumGuardError):
    """No signature was made, for the reason in the text."""


def sign(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
    """Signs all files of a folder, its manifest included, into `model.sig`, which `model_signing verify` reads.

    model-signing reads every file once more.

    Args:
        folder: Folder to sign.
        key: File with a private key (PEM, elliptic curve).

    Raises:
        BackendUnavailable: If model-signing is not installed.
        SigningFailed: If model-signing fails.
        OSError: If the signature cannot be written. A signature that was there before is kept then.
    """
    root = Path(folder)
    config = _module("signing").Config().set_hashing_config(_hashing(root))
    with tempfile.TemporaryDirectory() as scratch:
        signature = Path(scratch, SIGNATURE)
        try:
            config.use_elliptic_key_signer(private_key=Path(key)).sign(root, signature)
        except Exception as error:  # an invalid key fails in more ways than are documented
            raise SigningFailed(f"{root} was not signed: {error}") from error
        write_whole(root / SIGNATURE, signature.read_bytes())


def check(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> PreflightReport:
    """Checks whether `model.sig` is a signature of the folder by the owner of a key.

    model-signing reads every file.

    Args:
        folder: Folder that was signed.
        key: File with the public key (PEM).

    Raises:
        BackendUnavailable: If model-signing is not installed.
        InvalidInput: If the signature or the key does not exist.
    """
    root = Path(folder)
    for file in (root / SIGNATURE, Path(key)):
        if not file.is_file():
            raise InvalidInput(f"{file} does not exist, so no signature can be checked")
    try:
        _module("verifying").Config().use_elliptic_key_verifier(public_key=Path(key)).verify(root, root / SIGNATURE)
    except Exception as error:  # noqa: BLE001 - a hostile signature can fail in any way, and none of them is a pass
        message = f"{SIGNATURE} is no signature of these files by the owner of {Path(key).name}: {error}"
        remedy = "Get the files from a source that you trust."
        return PreflightReport((Finding("bad_signature", message, severity="error", file=SIGNATURE, remedy=remedy),))
    return PreflightReport(checked=(f"{SIGNATURE} is a signature of these files by the owner of {Path(key).name}.",))


def _hashing(root: Path) -> Any:
    """Configuration that hashes every file, except for signatures, git's files and the Hub's cache."""
    signatures = [path.relative_to(root) for path in root.rglob("*.sig")]
    config = (
        _module("hashing")
        .Config()
        .set_ignored_paths(paths=[SIGNATURE, HUB_DOWNLOADS, *signatures], ignore_git_paths=True)
    )
    return config.set_allow_symlinks(any(path.is_symlink() for path in root.rglob("*")))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise BackendUnavailable(f"model-signing is missing ({error}): pip install 'hallo-numguard[sign]'") from error
