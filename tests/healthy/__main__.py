"""Lives all healthy lives, and writes what came of them.

    cd tests && python -m healthy [--only SUBSTRING] [--steps NUMBER] [--markdown FILE]

Exit code: 0 all as it must be, 1 something is not.
"""

from __future__ import annotations

import fnmatch
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from healthy import ranks as rank_processes
from healthy.lives import ALLOWED, DTYPES, FAMILIES, STEPS, UNFIT, WORLDS, Life, Seen, all_lives, covering, problems

CORES = 2
SHOWN = 160  # characters of a line that the guard has said

_INTRODUCTION = (
    "Made by `make healthy`: small models of many families at their default initialisation learn what they can learn,",
    "each once guarded and once not, from the same seeds. A life is good if both end alike: after all steps, with the",
    "same bits in weights, buffers, optimizer state and the generators of torch, Python and numpy, on every rank; and",
    "if the guard has said nothing that somebody who trains such models would call false.",
)


@dataclass(frozen=True)
class Result:
    """What came of a life.

    Attributes:
        problems: What is wrong, in words.
        seen: What each rank has seen; empty if one died.
    """

    problems: Sequence[str]
    seen: Sequence[Seen] = ()

    @property
    def skipped(self) -> int:
        """Number of steps that were not applied."""
        return self.seen[0].skipped if self.seen else 0


Results = Mapping[Life, Result]


@click.command()
@click.option("--only", default="", help="Only lives with this in their name.")
@click.option("--all", "everything", is_flag=True, help="Every life, not only those that cover every pair.")
@click.option("--steps", default=STEPS, show_default=True, help="Number of steps of a life.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables here.")
def main(only: str, everything: bool, steps: int, markdown: Path | None) -> None:
    """Trains what is healthy, and looks whether the guard keeps quiet and changes nothing."""
    console = Console(stderr=True)
    started = time.monotonic()
    lives = all_lives(steps)
    lives = [life for life in (lives if everything else covering(lives)) if only in str(life)]
    results = _run(lives, console)
    minutes = (time.monotonic() - started) / 60
    failed = {life: result.problems for life, result in results.items() if result.problems}
    console.print(f"{len(lives) - len(failed)} of {len(lives)} lives as they must be, in {minutes:.1f} minutes")
    if markdown is not None:
        markdown.write_text(_document({life: results[life] for life in lives}, minutes), encoding="utf-8")
    sys.exit(1 if failed else 0)


def _run(lives: Sequence[Life], console: Console) -> Results:
    """Those of one process run side by side, those of two after them."""
    results: dict[Life, Result] = {}
    alone, together = ([life for life in lives if (life.world == 1) is single] for single in (True, False))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("healthy", total=len(lives))

        def live_all(group: Sequence[Life]) -> None:
            for life, result in _lived(group):
                results[life] = result
                progress.advance(task)
                for problem in result.problems:
                    console.print(f"{life}: {problem}", markup=False, highlight=False, soft_wrap=True)

        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(live_all, [alone[at::CORES] for at in range(CORES)]))
        live_all(together)
    return results


def _lived(lives: Sequence[Life]) -> Iterator[tuple[Life, Result]]:
    """Lives of the same number of processes, in the same processes."""
    if not lives:
        return
    ranks = rank_processes.start(lives[0].world)
    try:
        for life in lives:
            try:
                seen = ranks.run(life)
            except RuntimeError as error:
                yield life, Result([str(error)])
            else:
                yield life, Result(problems(life, seen), seen)
    finally:
        ranks.stop()


def _document(results: Results, minutes: float) -> str:
    good = sum(not result.problems for result in results.values())
    steps = sum(life.steps for life, result in results.items() if not result.problems)
    packages = ("torch", "transformers", "accelerate", "lightning", "deepspeed")
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in packages)
    lengths = sorted({life.steps for life in results})
    each = " to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))
    failed = [(life, problem) for life, result in results.items() for problem in result.problems]
    lines = [
        "# Healthy lives",
        *_INTRODUCTION,
        "",
        f"**{good} of {len(results)} lives are good**, {steps:,} guarded steps, {each} a life.",
        f"{minutes:.0f} minutes on the CPU.",
        f"{versions}.",
        "",
        "Every family trains in every precision and in every way that fits it, but not in every combination of these:",
        *(f"- {name}: {text}" for name, text in DTYPES.items()),
        "- DDP, FSDP2 and ZeRO: two processes; the others one.",
        "",
        "## Good lives, of all",
        "A number in brackets: steps that a scaler skipped, in all these lives.",
        "",
        f"| family | {' | '.join(WORLDS)} |",
        f"|---|{'---|' * len(WORLDS)}",
        *(f"| {family} | {' | '.join(_cell(results, family, way) for way in WORLDS)} |" for family in FAMILIES),
        "",
        "An empty cell is no life:",
        *(f"- {family.replace('*', '...')} in {_ways(way, dtype)}: {why}" for family, way, dtype, why in UNFIT),
        "",
        "## What was said",
        "Every report, finding and line of the log from warning upwards, on rank 0.",
        "",
        "| line | times | lives | families | true, because |",
        "|---|---|---|---|---|",
        *_said(results),
    ]
    if failed:
        lines += ["", "## Not good", *(f"- {life}: {_short(problem)}" for life, problem in failed)]
    return "\n".join(lines) + "\n"


def _cell(results: Results, family: str, way: str) -> str:
    here = [result for life, result in results.items() if (life.family, life.way) == (family, way)]
    skipped = sum(result.skipped for result in here)
    good = sum(not result.problems for result in here)
    return f"{good}/{len(here)}{f' ({skipped})' if skipped else ''}" if here else ""


def _ways(pattern: str, dtype: str) -> str:
    ways = ", ".join(fnmatch.filter(WORLDS, pattern))
    return ways if dtype == "*" else f"{ways} with {' and '.join(fnmatch.filter(DTYPES, dtype))}"


def _said(results: Results) -> Iterator[str]:
    times: Counter[str] = Counter()
    lives: Counter[str] = Counter()
    families: dict[str, list[str]] = {}
    for life, result in results.items():
        for line, count in (result.seen[0].said if result.seen else {}).items():
            times[line] += count
            lives[line] += 1
            families.setdefault(line, []).append(life.family)
    for line, count in sorted(times.items()):
        reasons = [why for _, pattern, why in ALLOWED if re.match(pattern, line)]
        names = ", ".join(dict.fromkeys(families[line]))
        yield f"| {_short(line)} | {count} | {lives[line]} | {names} | {reasons[0] if reasons else '**no**'} |"


def _short(line: str) -> str:
    flat = " ".join(line.split()).replace("|", "\\|")
    return textwrap.shorten(flat, SHOWN, placeholder=" ...")


if __name__ == "__main__":
    main()
