"""`hallo-numguard diff`."""

from __future__ import annotations

from pathlib import Path

import click

from hallo_numguard.cli import _shared as shared


@click.command(
    "diff",
    epilog=shared.epilog("diff model.safetensors pytorch_model.bin", "diff run/step1000 run/step2000 --format json"),
)
@click.argument("a", type=shared.PATH)
@click.argument("b", type=shared.PATH)
@shared.format_option
def command(a: Path, b: Path, style: str) -> int:
    """Compare two models or checkpoints, tensor by tensor.

    A and B are files or folders in any format that `scan` reads. Tensors are matched by name.
    """
    from hallo_numguard.files.diff import diff

    return shared.print_findings(diff(a, b), style)
