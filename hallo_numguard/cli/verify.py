"""`hallo-numguard verify`."""

from __future__ import annotations

from pathlib import Path

import click

from hallo_numguard.cli import _shared as shared
from hallo_numguard.core.findings import merge


@click.command("verify", epilog=shared.epilog("verify model/", "verify model/ --manifest SHA256SUMS --key public.pem"))
@click.argument("folder", type=shared.PATH)
@shared.manifest_option
@click.option("--key", type=shared.PATH, help="Also check the signature, with this public key (PEM).")
@shared.format_option
def command(folder: Path, listing: Path | None, key: Path | None, style: str) -> int:
    """Compare a folder with its manifest.

    Names files of FOLDER that are missing, extra or changed, and which tensors of them differ. Reads what `manifest`
    wrote, lists of checksums that sha256sum or md5sum wrote, and the digests that the Hugging Face Hub gave.
    """
    from hallo_numguard.files.manifest import signing
    from hallo_numguard.files.manifest.verify import verify_manifest

    with shared.progress_bar() as advance:
        reports = [verify_manifest(folder, listing, progress=advance)]
    if key is not None:
        reports.append(signing.check(folder, key))
    return shared.print_findings(merge(reports), style)
