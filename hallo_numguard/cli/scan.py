"""`hallo-numguard scan`."""

from __future__ import annotations

from pathlib import Path

import click

from hallo_numguard.cli import _shared as shared


@click.command(
    "scan", epilog=shared.epilog("scan model.safetensors", "scan model/ checkpoint/ --dtype float16 --format json")
)
@click.argument("paths", nargs=-1, required=True, type=shared.PATH)
@shared.dtype_option
@shared.threads_option
@shared.format_option
def command(paths: tuple[Path, ...], dtype: str | None, threads: int | None, style: str) -> int:
    """Find damaged values in weights and checkpoints.

    Reads every tensor of PATHS once: files of weights (safetensors, torch.save), and folders of models and checkpoints.
    No code in the files runs.
    """
    from hallo_numguard.files.scan.scan import scan

    with shared.progress_bar() as advance:
        found = scan(*paths, dtype=dtype, threads=threads, progress=advance)
    return shared.print_findings(found, style)
