"""Runs the whole campaign, and writes what came of it.

    cd tests && python -m campaign [--only SUBSTRING] [--world 1] [--markdown FILE]

Exit code: 0 all as it must be, 1 something is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from campaign.cases import CLEAN_STEPS, EXPECTED, FAULTS, SETUPS, Case, Kind, all_cases, problems
from campaign.options import OPTIONS
from campaign.ranks import Ranks

_INTRODUCTION = (
    "Made by `make campaign`: every fault in every engine, on real DeepSpeed engines with 1, 2 and 4 processes, each",
    "with a small transformer, most also with a small convolutional UNet and a mixture of experts. A case is good if",
    "tensor, rank, index and verdict are the planted ones on every rank, the right steps were skipped, nothing else",
    "was found, and the weights are finite in the end.",
)
_EMPTY_CELLS = (
    "An empty cell: the fault cannot be there (DeepSpeed 0.19.8 does not scale the loss at stage 0, and never lowers",
    "the scale of torch_autocast at later stages; ZeRO 1 to 3 divide before they add up; nothing is scaled but",
    "float16; compiled code calls no hook that is put on a module inside of it later, by which this fault is planted).",
)
_CONFIGURATIONS = (
    "*DeepSpeed alone*: what becomes of 30 steps without a guard. *Same bits*: runs of 30 steps with a guard, without",
    "gradient clipping, whose losses are bit for bit those without. *Faults named*: good cases with a fault, of all.",
    "`python tools/write_tables.py` copies this table into [deepspeed.md](deepspeed.md).",
)
_OPTIONS = ("Each with 2 processes and four of the faults: `weight`, `forward`, `gradient`, and `none`.",)


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        problems: What is wrong, in words.
        alone: What DeepSpeed does without a guard; None if it was not tried.
        same_bits: Whether all ranks' losses are those without a guard; None if it was not tried.
    """

    problems: Sequence[str]
    alone: str | None = None
    same_bits: bool | None = None


Results = Mapping[Case, Result]


@click.command()
@click.option("--only", default="", help="Only cases with this in their name.")
@click.option("--world", "worlds", type=int, multiple=True, help="Only as many ranks.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the table here.")
def main(only: str, worlds: tuple[int, ...], markdown: Path | None) -> None:
    """Plants every fault in every engine, and looks whether the guard names it."""
    console = Console(stderr=True)
    started = time.monotonic()
    cases = [case for case in all_cases() if only in str(case) and (not worlds or case.world in worlds)]
    results = _run(cases, console)
    minutes = (time.monotonic() - started) / 60
    failed = [case for case, result in results.items() if result.problems]
    console.print(f"{len(cases) - len(failed)} of {len(cases)} cases as they must be, in {minutes:.1f} minutes")
    if markdown is not None:
        markdown.write_text(_document(results, minutes), encoding="utf-8")
    sys.exit(1 if failed else 0)


def _run(cases: Sequence[Case], console: Console) -> Results:
    results: dict[Case, Result] = {}
    ranks = Ranks()
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for case in progress.track(sorted(cases, key=Ranks.of), description="campaign"):
            result = results[case] = _result(case, ranks)
            if result.problems:
                text = f"{case}: {'; '.join(result.problems)}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
    ranks.stop()
    return {case: results[case] for case in cases}


def _result(case: Case, ranks: Ranks) -> Result:
    try:
        seen = ranks.run(case)
    except RuntimeError as error:
        return Result([str(error)])
    tried = [one.same_bits for one in seen if one.same_bits is not None]
    return Result(problems(case, seen), seen[0].alone, all(tried) if tried else None)


def _document(results: Results, minutes: float) -> str:
    planted = {case: result for case, result in results.items() if case.fault != "refused"}
    kinds = list(dict.fromkeys(case.kind for case in planted))
    configurations = [kind for kind in kinds if kind.way not in OPTIONS]
    faults = [fault for fault in FAULTS if any(case.fault == fault for case in planted)]
    versions = f"DeepSpeed {version('deepspeed')}, torch {version('torch').partition('+')[0]}"
    good = sum(not result.problems for result in planted.values())
    clean = CLEAN_STEPS * sum(case.fault == "none" and not result.problems for case, result in planted.items())
    lines = [
        "# The fault campaign",
        *_INTRODUCTION,
        "",
        f"**{good:,} of {len(planted):,} cases are good**, in {len(kinds)} kinds of engine, among them {clean:,} clean",
        f"steps without an alarm. {versions}, CPU, {minutes:.0f} minutes.",
        "",
        "| fault | what is planted | what the guard must say |",
        "|---|---|---|",
        *(f"| `{fault}` | {FAULTS[fault]} | {EXPECTED[fault]} |" for fault in faults),
        "",
        "## Configurations",
        *_CONFIGURATIONS,
        "",
        "| configuration | processes | DeepSpeed alone | clean runs, same bits | faults named |",
        "|---|---|---|---|---|",
        *(_configuration(kind, planted) for kind in configurations),
        *(
            f"| {case.model} | {case.world} | {result.alone} | refused |  |"
            for case, result in results.items()
            if case.fault == "refused"
        ),
        "",
        "## Options and loops",
        *_OPTIONS,
        "",
        "| option or loop | engines | DeepSpeed alone | clean runs, same bits | faults named |",
        "|---|---|---|---|---|",
        *(_option(key, planted) for key in OPTIONS if any(kind.way == key for kind in kinds)),
        "",
        "## Good cases, of all",
        f"| engine | {' | '.join(f'`{fault}`' for fault in faults)} |",
        f"|---|{'---|' * len(faults)}",
        *(f"| {kind} | {' | '.join(_cell(planted, fault, kind) for fault in faults)} |" for kind in configurations),
        "",
        *_EMPTY_CELLS,
    ]
    failed = [(case, result.problems) for case, result in results.items() if result.problems]
    if failed:
        lines += ["", "## Not good", *(f"- {case}: {'; '.join(found)}" for case, found in failed)]
    return "\n".join(lines) + "\n"


def _configuration(kind: Kind, results: Results) -> str:
    here = {case: result for case, result in results.items() if case.kind == kind}
    worlds = ", ".join(map(str, sorted({case.world for case in here})))
    return f"| {kind.words} | {worlds} | {_outcomes(here)} |"


def _option(key: str, results: Results) -> str:
    here = {case: result for case, result in results.items() if case.way == key}
    engines = ", ".join(f"stage {stage} {SETUPS[setup]}" for setup, stage in OPTIONS[key].engines)
    return f"| {OPTIONS[key].words} | {engines} | {_outcomes(here)} |"


def _outcomes(results: Results) -> str:
    clean = [result for case, result in results.items() if case.fault == "none"]
    named = [not result.problems for case, result in results.items() if case.fault != "none"]
    alone = "; ".join(dict.fromkeys(result.alone or "not tried" for result in clean))
    return f"{alone} | {sum(bool(result.same_bits) for result in clean)}/{len(clean)} | {sum(named)}/{len(named)}"


def _cell(results: Results, fault: str, kind: Kind) -> str:
    here = [not result.problems for case, result in results.items() if (case.fault, case.kind) == (fault, kind)]
    return f"{sum(here)}/{len(here)}" if here else ""


if __name__ == "__main__":
    main()
