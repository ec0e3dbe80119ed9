"""Makes many tries on 1, 2 and 4 ranks.

    cd tests && python -m chaos [--tries N] [--seed N] [--model cut]

Exit code: 0 no run has noticed, 1 one has.
"""

from __future__ import annotations

import sys

import click

from chaos.ranks import run
from chaos.tries import WAYS


@click.command()
@click.option("--tries", default=100, show_default=True, help="Tries on each number of ranks.")
@click.option("--seed", default=0, show_default=True, help="Seed of the tries.")
@click.option("--model", "models", type=click.Choice(list(WAYS)), multiple=True, help="Only models of this kind.")
def main(tries: int, seed: int, models: tuple[str, ...]) -> None:
    """Lets something go wrong in a random part of the guard, and looks whether the run notices."""
    failed = False
    for model, world in [(name, world) for name in models or WAYS for world in WAYS[name]]:
        outcome = run(world, seed, tries, model)
        for line in outcome.wrong:
            click.echo(line)
        click.echo(f"{world} ranks, the model {model}: {tries} tries, {outcome.hit} of them met what they were to meet")
        failed |= bool(outcome.wrong) or not outcome.hit
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
