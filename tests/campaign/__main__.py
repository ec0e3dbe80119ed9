"""Runs the whole campaign, and writes what came of it.

    cd tests && python -m campaign [--only SUBSTRING] [--world 1] [--markdown FILE]

Exit code: 0 all as it must be, 1 something is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from campaign import ranks as rank_processes
from campaign.cases import CLEAN_STEPS, EXPECTED, FAULTS, WORLDS, Case, all_cases, problems

_INTRODUCTION = (
    "Made by `make campaign`: every fault in every engine, on real DeepSpeed engines with 1 and 2 processes, each with",
    "a small transformer and a small convolutional UNet. A case is good if tensor, rank, index and verdict are the",
    "planted ones on every rank, the right steps were skipped, nothing else was found, and the weights are finite in",
    "the end.",
)
_EMPTY_CELLS = (
    "An empty cell: the fault cannot be there (DeepSpeed 0.19.8 does not scale the loss at stage 0; ZeRO 1 to 3 divide",
    "before they add up; nothing is scaled but float16).",
)

Results = Mapping[Case, Sequence[str]]


@click.command()
@click.option("--only", default="", help="Only cases with this in their name.")
@click.option("--world", "worlds", type=click.Choice(list(map(str, WORLDS))), multiple=True, help="Only as many ranks.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the table here.")
def main(only: str, worlds: tuple[str, ...], markdown: Path | None) -> None:
    """Plants every fault in every engine, and looks whether the guard names it."""
    console = Console(stderr=True)
    started = time.monotonic()
    cases = [case for case in all_cases() if only in str(case) and (not worlds or str(case.world) in worlds)]
    results = _run(cases, console)
    minutes = (time.monotonic() - started) / 60
    failed = {case: found for case, found in results.items() if found}
    for case, found in failed.items():
        console.print(f"{case}: {'; '.join(found)}", markup=False, highlight=False)
    console.print(f"{len(cases) - len(failed)} of {len(cases)} cases as they must be, in {minutes:.1f} minutes")
    if markdown is not None:
        markdown.write_text(_document(results, minutes), encoding="utf-8")
    sys.exit(1 if failed else 0)


def _run(cases: Sequence[Case], console: Console) -> Results:
    results: dict[Case, Sequence[str]] = {}
    groups = {world: rank_processes.start(world) for world in WORLDS}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for case in progress.track(sorted(cases, key=lambda case: case.world), description="campaign"):
            try:
                results[case] = problems(case, groups[case.world].run(case))
            except RuntimeError as error:
                results[case] = [str(error)]
    for group in groups.values():
        group.stop()
    return results


def _document(results: Results, minutes: float) -> str:
    engines = list(dict.fromkeys(case.kind for case in results))
    faults = [fault for fault in FAULTS if any(case.fault == fault for case in results)]
    versions = f"DeepSpeed {version('deepspeed')}, torch {version('torch').partition('+')[0]}"
    good = sum(not found for found in results.values())
    clean = CLEAN_STEPS * sum(case.fault == "none" and not found for case, found in results.items())
    lines = [
        "# The fault campaign",
        *_INTRODUCTION,
        "",
        f"**{good} of {len(results)} cases are good**, among them {clean:,} clean steps without an alarm.",
        f"{versions}, CPU, {minutes:.0f} minutes.",
        "",
        "| fault | what is planted | what the guard must say |",
        "|---|---|---|",
        *(f"| `{fault}` | {FAULTS[fault]} | {EXPECTED[fault]} |" for fault in faults),
        "",
        "## Good cases, of all",
        f"| engine | {' | '.join(f'`{fault}`' for fault in faults)} |",
        f"|---|{'---|' * len(faults)}",
        *(f"| {engine} | {' | '.join(_cell(results, fault, engine) for fault in faults)} |" for engine in engines),
        "",
        *_EMPTY_CELLS,
    ]
    failed = [(case, found) for case, found in results.items() if found]
    if failed:
        lines += ["", "## Not good", *(f"- {case}: {'; '.join(found)}" for case, found in failed)]
    return "\n".join(lines) + "\n"


def _cell(results: Results, fault: str, engine: str) -> str:
    here = [not found for case, found in results.items() if (case.fault, case.kind) == (fault, engine)]
    return f"{sum(here)}/{len(here)}" if here else ""


if __name__ == "__main__":
    main()
