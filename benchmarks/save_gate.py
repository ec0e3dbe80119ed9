"""What the check before a save costs, against the save.

    python benchmarks/save_gate.py [--quick] [--case state] [--rounds 7] [--json FILE]

A guarded save and a plain one take turns, each into a folder of its own that is deleted, untimed, before the next; the
check alone is timed too. A figure is the median over the rounds.

- state: `Accelerator.save_state`: weights in safetensors, and AdamW's moments.
- model: `Accelerator.save_model`: weights alone.

Exit code: 0 done, 2 wrong usage or no native extension.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import click
import torch
from machine import prepare
from output import MIB, json_option, make_console, print_facts, print_table, quick_option, rounds_option, write_json
from timing import alternate, median_ratio
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard.save_gate import Save

SIZE, LAYERS, ROUNDS = 50_000_000, 48, 7
QUICK_SIZE, QUICK_ROUNDS = 100_000, 2
CASES = {"state": Save("state"), "model": Save("model", weights_only=True)}


@dataclass(frozen=True)
class Result:
    """What a case gave.

    Attributes:
        case: Key of `CASES`.
        rounds: Saves of each kind.
        mebibytes: Size of what is saved.
        save_ms: Time of a plain save, median.
        check_ms: Time of the check alone, median.
        ratio: Time of the check over that of the save in the same round, median.
    """

    case: str
    rounds: int
    mebibytes: float
    save_ms: float
    check_ms: float
    ratio: float


class Run:
    """A guarded run that has made a step."""

    def __init__(self, elements: int) -> None:
        width = int((elements / LAYERS) ** 0.5)
        self.accelerator = accelerate.Accelerator(cpu=True)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        self.model, optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        self.guard = ng.attach(self.accelerator)
        self.accelerator.backward(self.model(torch.randn(1, width)).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def save(self, case: str, folder: Path) -> None:
        """Saves without a check."""
        (session,) = self.guard._sessions()
        with session.save_gate.passed(CASES[case]):
            if case == "state":
                self.accelerator.save_state(str(folder))
            else:
                self.accelerator.save_model(self.model, str(folder))

    def check(self, case: str) -> None:
        """Makes the check alone."""
        (session,) = self.guard._sessions()
        assert session.check_save(CASES[case]) is None


def measure(run: Run, case: str, rounds: int) -> Result:
    """Times a case."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        ways: dict[str, Callable[[], None]] = {"save": lambda: run.save(case, folder), "check": lambda: run.check(case)}
        seconds = alternate(ways, rounds, prepare=lambda: shutil.rmtree(folder, ignore_errors=True))
        run.save(case, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*")) / MIB
    save, check = (1e3 * statistics.median(seconds[way]) for way in ("save", "check"))
    return Result(case, rounds, size, save, check, median_ratio(seconds["check"], seconds["save"]))


@click.command()
@click.option("--case", "names", type=click.Choice(list(CASES)), multiple=True, default=tuple(CASES), help="Repeat.")
@rounds_option
@quick_option
@json_option
def main(names: tuple[str, ...], rounds: int | None, quick: bool, json_path: Path | None) -> None:
    """Measure the check before a save against the save."""
    console, machine = make_console(), prepare()
    print_facts(console, machine)
    run = Run(QUICK_SIZE if quick else SIZE)
    results = [measure(run, name, rounds or (QUICK_ROUNDS if quick else ROUNDS)) for name in names]
    rows = [
        [item.case, f"{item.mebibytes:.0f}", f"{item.save_ms:.1f}", f"{item.check_ms:.2f}", f"{item.ratio:.4f}"]
        for item in results
    ]
    print_table(console, "Checks before saves", ["case", "MiB", "save ms", "check ms", "ratio"], rows)
    write_json(json_path, machine, results)


if __name__ == "__main__":
    main()
