"""Plants every cause in every way of training, and writes what was named.

    cd tests && python -m causes [--only SUBSTRING] [--markdown FILE]

Exit code: 0 all as it must be, 1 something is not.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from causes import ranks as rank_processes
from causes.cases import (
    BAD_STEPS,
    WITH_STEP,
    WORLDS,
    Case,
    Seen,
    all_cases,
    covering,
    once_each_under_inductor,
    problems,
)
from causes.table import EXPECTED

CORES = 2
SHOWN = 200  # characters of what is wrong with a case
_COLUMNS = ("verdict", "operation", "line", "module", "sample")

_INTRODUCTION = (
    "Made by `make campaign`: each cause of a value that is not finite is planted in a small model, or in the code",
    "that makes the loss of what the model returns, and trained for six steps, of which two are bad, in every way and",
    "in every precision that fits it; not in every combination of these, but in each of any two.",
    "",
    "A case is good if the clean steps have no report, nothing that is said is false, and the report of a bad step",
    "names the verdict, the operation, its line and its module, and no other sample or rank than the bad one: the",
    "report of the first bad step where the cause is in the model, or where the guard knows the function that makes",
    f"the loss ({', '.join(WITH_STEP)}); elsewhere that of the second one, when the guard watches every operation.",
    "",
    "Among several ranks a bad loss with finite gradients (no label at all) is told, but not explained.",
)


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        problems: What is wrong, in words.
        seen: What each rank has seen; empty if one died.
    """

    problems: Sequence[str]
    seen: Sequence[Seen] = ()

    @property
    def named(self) -> Mapping[str, object]:
        """The last report of a bad step, on rank 0; empty if there is none."""
        return self.seen[0].reports.get(str(BAD_STEPS[1]), {}) if self.seen else {}


Results = Mapping[Case, Result]


@click.command()
@click.option("--only", default="", help="Only cases with this in their name.")
@click.option("--inductor/--no-inductor", default=True, help="Whether to compile each cause once by inductor.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables here.")
def main(only: str, inductor: bool, markdown: Path | None) -> None:
    """Plants every cause, and looks whether the guard names it."""
    console = Console(stderr=True)
    started = time.monotonic()
    cases = covering(all_cases(EXPECTED)) + (once_each_under_inductor(EXPECTED) if inductor else [])
    results = _run([case for case in cases if only in str(case)], console)
    minutes = (time.monotonic() - started) / 60
    good = sum(not result.problems for result in results.values())
    console.print(f"{good} of {len(results)} cases as they must be, in {minutes:.1f} minutes")
    if markdown is not None:
        markdown.write_text(_document(results, minutes), encoding="utf-8")
    sys.exit(0 if good == len(results) else 1)


def _run(cases: Sequence[Case], console: Console) -> Results:
    """Those of one process run side by side, those of two after them."""
    results: dict[Case, Result] = {}
    alone, together = ([case for case in cases if (case.world == 1) is single] for single in (True, False))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("causes", total=len(cases))

        def run_all(group: Sequence[Case]) -> None:
            for case, result in _results(group):
                results[case] = result
                progress.advance(task)
                for problem in result.problems:
                    console.print(f"{case}: {problem}", markup=False, highlight=False, soft_wrap=True)

        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(run_all, [alone[at::CORES] for at in range(CORES)]))
        run_all(together)
    return {case: results[case] for case in cases}


def _results(cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
    """Results of cases of the same number of processes, in the same processes."""
    if not cases:
        return
    ranks = rank_processes.start(cases[0].world)
    try:
        for case in cases:
            try:
                seen = ranks.run(case)
            except RuntimeError as error:
                yield case, Result([str(error)])
            else:
                yield case, Result(problems(case, EXPECTED[case.cause], seen), seen)
    finally:
        ranks.stop()


def _document(results: Results, minutes: float) -> str:
    good = sum(not result.problems for result in results.values())
    versions = ", ".join(
        f"{name} {version(name).partition('+')[0]}"
        for name in ("torch", "transformers", "accelerate", "lightning", "deepspeed")
    )
    causes = list(dict.fromkeys(case.cause for case in results))
    failed = [(case, problem) for case, result in results.items() for problem in result.problems]
    lines = [
        "# What is named, by cause and by way of training",
        *_INTRODUCTION,
        "",
        f"**{good} of {len(results)} cases are good**, of {len(causes)} causes.",
        f"{minutes:.0f} minutes on the CPU, {versions}.",
        "",
        "## What is named",
        "The verdict, if the cause is in the model and if it is in the loss; then in how many cases the report named",
        "the verdict, the operation, its line in the script, the module (of cases with the cause in the model) and the",
        "sample. An operation that mixes samples has none of its own.",
        "",
        f"| cause | in the model | in the loss | cases | {' | '.join(_COLUMNS)} |",
        f"|---|---|---|---|{'---|' * len(_COLUMNS)}",
        *(_cause_row(results, cause) for cause in causes),
        "",
        "## Good cases, of all",
        f"| cause | {' | '.join(WORLDS)} |",
        f"|---|{'---|' * len(WORLDS)}",
        *(f"| {cause} | {' | '.join(_cell(results, cause, way) for way in WORLDS)} |" for cause in causes),
        "",
        "An empty cell is no case: it cannot be there, or the [fault campaign](campaign.md) plants it.",
    ]
    if failed:
        lines += ["", "## Not good", *(f"- {case}: {_short(problem)}" for case, problem in failed)]
    return "\n".join(lines) + "\n"


def _cause_row(results: Results, cause: str) -> str:
    expected = EXPECTED[cause]
    verdicts = [f"`{expected.verdicts[place]}`" if place in expected.places else "" for place in ("model", "loss")]
    here = {case: result.named for case, result in results.items() if case.cause == cause}
    inside = [report for case, report in here.items() if case.place == "model"]
    counts = [
        sum(report.get("verdict") == expected.verdicts[case.place] for case, report in here.items()),
        sum(bool(report.get("operation")) for report in here.values()) if expected.operations else "",
        sum(bool(report.get("line")) for report in here.values()) if expected.operations else "",
        f"{sum(bool(report.get('module')) for report in inside)} of {len(inside)}" if inside else "",
        sum(report.get("sample") is not None for report in here.values()),
    ]
    return f"| {cause} | {' | '.join(verdicts)} | {len(here)} | {' | '.join(map(str, counts))} |"


def _cell(results: Results, cause: str, way: str) -> str:
    here = [not result.problems for case, result in results.items() if (case.cause, case.way) == (cause, way)]
    return f"{sum(here)}/{len(here)}" if here else ""


def _short(problem: str) -> str:
    return textwrap.shorten(" ".join(problem.split()).replace("|", "\\|"), SHOWN, placeholder=" ...")


if __name__ == "__main__":
    main()
