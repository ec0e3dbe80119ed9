"""Writes archives by a grammar and compares what torch.load gives with what the scanner reads.

    python tests/fuzz/differential.py [--cases 100000] [--first 0]

Exit code: 0 all are the same, 1 one differs, which is printed with its number.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import torch_archives as archives


@click.command()
@click.option("--cases", default=100_000, show_default=True, help="Number of archives.")
@click.option("--first", default=0, show_default=True, help="Number of the first.")
def main(cases: int, first: int) -> None:
    """Compares torch.load with the scanner."""
    path = Path(tempfile.mkdtemp()) / "a.pt"
    taken = 0
    for seed in range(first, first + cases):
        path.write_bytes(archives.random_archive(seed))
        taken += archives.loaded(path) is not None
        found = archives.difference(path)
        if found is not None:
            click.echo(f"archive {seed}: torch.load gives {found}, and the scanner does not read them")
            sys.exit(1)
    click.echo(f"{cases} archives, of which torch.load takes {taken}: all are read as it reads them")


if __name__ == "__main__":
    main()
