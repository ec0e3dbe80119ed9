"""Tries the guard on releases of DeepSpeed, each in a process of its own, and writes what holds.

    cd tests && PYTHONPATH=support python -m releases FOLDER [--markdown ../docs/deepspeed.md]

FOLDER holds a folder for each release, named after it, as `pip install --target` makes them.

Exit code: 0 all holds, or is refused, or fails without the guard as well; 1 something does not hold.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch

from paths import IMPORTABLE

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 600  # seconds for a release
_TABLE = re.compile(r"(<!-- releases -->\n).*?(<!-- end -->)", re.DOTALL)

Found = Mapping[str, str]
"""By kind of engine what does not hold, "" where all does."""


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Page with a table of releases.")
def main(folder: Path, markdown: Path | None) -> None:
    """Tries the guard on releases of DeepSpeed."""
    found = {path.name: tried(path) for path in sorted(folder.iterdir(), key=_number)}
    for release, kinds in found.items():
        for kind, problem in kinds.items():
            if problem:
                click.echo(f"{release} {kind}: {problem}")
    if markdown is not None:
        page = markdown.read_text(encoding="utf-8")
        table = _table(found)
        markdown.write_text(_TABLE.sub(lambda match: match[1] + table + match[2], page), encoding="utf-8")
    sys.exit(any(_is_ours(problem) for kinds in found.values() for problem in kinds.values()))


def tried(release: Path) -> Found:
    """Runs the worker on a release."""
    path = os.pathsep.join(filter(None, [str(release.resolve()), IMPORTABLE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER)], env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return {"all": "hangs"}
    found = {line["kind"]: line["found"] for line in map(json.loads, done.stdout.splitlines())}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return {**found, "import" if not found else "the rest": f"DeepSpeed: {last[0]}"}
    return found


def _number(release: Path) -> Sequence[int]:
    return [int(part) for part in re.findall(r"\d+", release.name)]


def _is_ours(problem: str) -> bool:
    return bool(problem) and not problem.startswith(("DeepSpeed: ", "refused: "))


def _table(found: Mapping[str, Found]) -> str:
    lines = [
        f"torch {torch.__version__.partition('+')[0]}, one process on a CPU.\n",
        "| release | kinds of engine in which all holds | refused | DeepSpeed itself fails | does not hold |",
        "|---|---|---|---|---|",
    ]
    for release, kinds in found.items():
        good = sum(not problem for problem in kinds.values())
        refused = _listed(kinds, "refused: ")
        fails = _listed(kinds, "DeepSpeed: ")
        ours = "; ".join(f"{kind} ({problem})" for kind, problem in kinds.items() if _is_ours(problem))
        lines.append(f"| {release} | {good} of {len(kinds)} | {refused} | {fails} | {ours} |")
    return "\n".join(lines) + "\n"


def _listed(kinds: Found, beginning: str) -> str:
    """The kinds with such a problem, those with the same one together."""
    together: dict[str, list[str]] = {}
    for kind, problem in kinds.items():
        if problem.startswith(beginning):
            together.setdefault(problem.removeprefix(beginning), []).append(kind)
    return "; ".join(f"{', '.join(names)} ({problem})" for problem, names in together.items())


if __name__ == "__main__":
    main()
