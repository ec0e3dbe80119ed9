"""Makes many tries on 1, 2 and 4 ranks.

    cd tests && python -m chaos [--tries N] [--seed N]

Exit code: 0 no run has noticed, 1 one has.
"""

from __future__ import annotations

import sys

import click

from chaos.ranks import run
from chaos.tries import CUT_WAYS, WAYS


@click.command()
@click.option("--tries", default=100, show_default=True, help="Tries on each number of ranks.")
@click.option("--seed", default=0, show_default=True, help="Seed of the tries.")
def main(tries: int, seed: int) -> None:
    """Lets something go wrong in a random part of the guard, and looks whether the run notices."""
    failed = False
    for world, is_cut in [*((world, False) for world in WAYS), *((world, True) for world in CUT_WAYS)]:
        outcome = run(world, seed, tries, is_cut)
        for line in outcome.wrong:
            click.echo(line)
        what = f"{world} ranks{', the model cut' if is_cut else ''}"
        click.echo(f"{what}: {tries} tries, {outcome.hit} of them met what they were to meet")
        failed |= bool(outcome.wrong) or not outcome.hit
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
