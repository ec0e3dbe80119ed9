"""Runs DeepSpeed's own unit tests twice, without a guard and with one on every engine, and compares the outcomes.

    python tools/deepspeed_tests.py CHECKOUT [unit/runtime/half_precision ...] [-k EXPRESSION] [--json FILE]

CHECKOUT is a clone of DeepSpeed at the tag of the installed release; tests are given as paths below its `tests` folder.
Where there is no GPU the tests run on the CPU, in float16 too; those that need DeepSpeed's compiled operators skip
themselves. A test that hangs fails alone.

Exit code: 0 no test has another outcome with the guard, 1 one has, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import click
from rich.console import Console

ROOT = Path(__file__).parents[1]
PREPARING = Path(__file__).with_name("of_deepspeed_tests")
DEFAULT_TESTS = (
    "unit/runtime/half_precision",
    "unit/runtime/zero",
    "unit/runtime/test_autocast.py",
    "unit/runtime/test_multiple_models.py",
    "unit/runtime/test_multi_output_model.py",
    "unit/runtime/test_ds_initialize.py",
    "unit/checkpoint",
    "unit/v1/moe",
    "unit/model_parallelism",
    "unit/pipe",
)
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "hung_tests", "--continue-on-collection-errors")
PROCESSES = 4  # what DeepSpeed takes for the number of devices of a machine without GPUs

Outcomes = Mapping[str, str]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("tests", nargs=-1)
@click.option("-k", "only", default="", help="Only tests that match, as pytest's -k.")
@click.option("--timeout", default=120, show_default=True, help="Seconds that one test may take.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File for all outcomes.")
def main(checkout: Path, tests: Sequence[str], only: str, timeout: int, json_path: Path | None) -> None:
    """Runs DeepSpeed's unit tests without and with a guard on every engine."""
    console = Console()
    chosen = list(tests or DEFAULT_TESTS)
    missing = [path for path in chosen if not (checkout / "tests" / path.partition("::")[0]).exists()]
    if missing:
        raise click.UsageError(f"no such tests in {checkout / 'tests'}: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "attached"
        log.touch()
        unguarded = _run(checkout, chosen, only, timeout, None)
        guarded = _run(checkout, chosen, only, timeout, log)
        attached = Counter(log.read_text(encoding="utf-8").splitlines())
    changed = {test: (before, guarded.get(test, "not run")) for test, before in unguarded.items()}
    changed = {test: pair for test, pair in changed.items() if pair[0] != pair[1]}
    for name, outcomes in (("without", unguarded), ("with", guarded)):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(outcomes.values()).items()))
        console.print(f"{name} a guard: {len(outcomes)} tests, {counts}")
    for outcome, count in attached.most_common():
        console.print(f"{count:5} engines {outcome}", highlight=False)
    for test, (before, after) in sorted(changed.items()):
        console.print(f"{test}: {before} without a guard, {after} with it", highlight=False)
    if json_path is not None:
        everything = {"unguarded": unguarded, "guarded": guarded, "engines": attached, "changed": changed}
        json_path.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    sys.exit(1 if changed else 0)


def _run(checkout: Path, tests: Sequence[str], only: str, timeout: int, log: Path | None) -> Outcomes:
    """Outcome of each test: passed, skipped, failed or error.

    Args:
        checkout: DeepSpeed's sources, of which only the tests are used.
        tests: Paths below its `tests` folder.
        only: Expression of pytest's -k; "" for all.
        timeout: Seconds that one test may take.
        log: File for what becomes of each engine; None for a run without a guard.
    """
    environment = {**os.environ, "LOCAL_SIZE": str(PROCESSES), "DS_UNITTEST_TIMEOUT": str(timeout)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if log is not None:
        environment["NUMGUARD_ATTACH_LOG"] = str(log)
    paths = [str(PREPARING), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *OPTIONS, f"--junitxml={report}", *tests]
        if only:
            command += ["-k", only]
        subprocess.run(command, cwd=checkout / "tests", env=environment, stdout=sys.stderr, check=False)
        if not report.exists():
            raise click.ClickException("pytest made no report: what it has written is above")
        return {_name(case): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _outcome(case: ElementTree.Element) -> str:
    for kind, outcome in (("error", "error"), ("failure", "failed"), ("skipped", "skipped")):
        if case.find(kind) is not None:
            return outcome
    return "passed"


if __name__ == "__main__":
    main()
