"""Writes the tables of the documents that are made from the code: verdicts, settings, command line.

    python tools/write_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit code is
1 if a document does not say what the code does.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from hallo_numguard.cli import main
from hallo_numguard.core.config import GuardConfig, Policy
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Verdict
from hallo_numguard.guard.diagnosis import remedies
from hallo_numguard.guard.diagnosis.catalog import CATALOG
from hallo_numguard.integrations.deepspeed.unsupported import UNSUPPORTED, refused_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/configuration.md", "docs/command_line.md", "docs/deepspeed.md", "docs/nan.md")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def verdicts() -> list[str]:
    """Each verdict, its evidence, and what the default policy does about it."""
    rows = ["| verdict | what was seen | default action |", "|---|---|---|"]
    return rows + [f"| `{verdict}` | {CATALOG[verdict].seen} | {_default_action(verdict)} |" for verdict in CATALOG]


def _default_action(verdict: Verdict) -> str:
    policy = Policy()
    first, last = (
        policy.action_for(
            OverflowReport(
                step=1,
                loss_scale=1.0,
                verdict=verdict,
                provisional=False,
                recoverable=CATALOG[verdict].recoverable,
                first=None,
                offenders=(),
                evidence=(),
                not_checked=(),
                advice="",
                consecutive_skips=skips,
            )
        )
        for skips in (1, policy.max_consecutive_skips)
    )
    return first if first == last else f"{first}; {last} after {policy.max_consecutive_skips} in a row"


def mends() -> list[str]:
    """What mends each family of operations."""
    rows = ["| operation | what mends it |", "|---|---|"]
    for names, text in remedies.table():
        rows.append(f"| {', '.join(f'`{name}`' for name in names.split())} | {text} |")
    return rows


def guard_config() -> list[str]:
    """The fields of GuardConfig."""
    return list(_fields_of(GuardConfig))


def policy() -> list[str]:
    """The fields of Policy."""
    return list(_fields_of(Policy))


def _fields_of(cls: type[Any]) -> Iterator[str]:
    text = inspect.cleandoc(cls.__doc__ or "").split("Attributes:\n")[1]
    described = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.MULTILINE | re.DOTALL))
    yield "| field | default | meaning |"
    yield "|---|---|---|"
    defaults = cls()
    for item in fields(cls):
        value = getattr(defaults, item.name)
        shown = f"`{type(value).__name__}()`" if isinstance(value, Policy) else f"`{value!r}`"
        yield f"| `{item.name}` | {shown} | {' '.join(described[item.name].split())} |"


def commands() -> list[str]:
    """The help text of every command."""
    lines = []
    group = main.make_context("hallo-numguard", ["env"], terminal_width=100)
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        if command is not None:
            context = click.Context(command, parent=group, info_name=name)
            lines += [f"## {name}", "```", command.get_help(context), "```"]
    return lines


def configurations() -> list[str]:
    """What the campaign has tried, and what is refused."""
    text = (ROOT / "docs" / "campaign.md").read_text(encoding="utf-8")
    tried = [row.strip("| ").split(" | ") for row in text.split("## Configurations")[1].split("##")[0].splitlines()]
    tried = [row for row in tried if len(row) >= 4][1:]
    refused = {item.feature: item for item in UNSUPPORTED}
    alone = {row[0]: row[2] for row in tried}
    rows = ["| configuration | processes | DeepSpeed alone | guard | clean runs, same bits | faults named |"]
    rows.append("|---|---|---|---|---|---|")
    for configuration, processes, by_itself, same, named in (row for row in tried if len(row) == 5):
        rows.append(f"| {configuration} | {processes} | {by_itself} | supported | {same} | {named} |")
    for feature, item in refused.items():
        rows.append(f"| {feature} |  | {alone.get(feature, 'not tried')} | refused: {item.reason} |  |  |")
    return rows


def options() -> list[str]:
    """Options of DeepSpeed and ways to write a loop, as the campaign has tried them."""
    text = (ROOT / "docs" / "campaign.md").read_text(encoding="utf-8")
    return [line for line in text.split("## Options and loops")[1].split("##")[0].splitlines() if line.startswith("|")]


TABLES = {
    "configurations": configurations,
    "options": options,
    "verdicts": verdicts,
    "mends": mends,
    "guard_config": guard_config,
    "policy": policy,
    "commands": commands,
    "unsupported": refused_table,
}


def filled_in(text: str) -> str:
    """Returns a document with its tables as the code has them."""
    return _TABLE.sub(lambda found: f"{found[1]}{chr(10).join(TABLES[found[2]]())}\n{found[3]}", text)


def write() -> int:
    """Writes or checks all documents; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    check = parser.parse_args().check
    outdated = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = filled_in(text)
        if new != text:
            outdated.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if outdated and check:
        sys.stderr.write(f"out of date: {', '.join(outdated)}; run python tools/write_tables.py\n")
    return int(bool(outdated) and check)


if __name__ == "__main__":
    sys.exit(write())
