"""`hallo-numguard manifest`."""

from __future__ import annotations

from pathlib import Path

import click

from hallo_numguard.cli import _shared as shared


@click.command("manifest", epilog=shared.epilog("manifest model/", "manifest model/ --md5 --sign private.pem"))
@click.argument("folder", type=shared.PATH)
@click.option("--md5", is_flag=True, help="Also write MD5SUMS.")
@click.option("--sign", metavar="KEY", type=shared.PATH, help="Also sign, with this private key (PEM).")
@shared.format_option
def command(folder: Path, md5: bool, sign: Path | None, style: str) -> int:
    """Write checksums and tensor statistics of a folder.

    Writes into FOLDER, for `verify`: SHA256SUMS for sha256sum -c, numguard.manifest.json in the format of OpenSSF model
    signing, and numguard.tensors.json with the digest and the statistics of every tensor.
    """
    from hallo_numguard.files.manifest import signing
    from hallo_numguard.files.manifest.write import write_manifest

    with shared.progress_bar() as advance:
        written = write_manifest(folder, md5=md5, progress=advance)
    if sign is not None and not written.unchecked:
        signing.sign(folder, sign)
    return shared.print_findings(written, style)
