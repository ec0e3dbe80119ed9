"""Builds DeepSpeed's operators, which the tests load where they find them and never compile.

    python tools/deepspeed_operators.py [--folder .ops] [cpu_adam ...]

They are those of a CPU; with DS_ACCELERATOR=cuda those of a GPU, of which there are more.

Each takes a minute or two. A build that is interrupted leaves a file `lock` behind, for which torch waits without a
word: this says which it is.

Exit code: 0 all are built, 1 something is missing or failed, 2 wrong usage.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

FOLDER = Path(__file__).parents[1] / ".ops"
# By name of the folder that each is built in; async_io, for NVMe, needs pin_memory.
BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}
GPU_BUILDERS = {"fused_lamb": "FusedLambBuilder", "fused_lion": "FusedLionBuilder", "quantizer": "QuantizerBuilder"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice([*BUILDERS, *GPU_BUILDERS]))
@click.option(
    "--folder", default=FOLDER, type=click.Path(file_okay=False, path_type=Path), help="Where they are built."
)
def main(names: Sequence[str], folder: Path) -> None:
    """Builds operators of DeepSpeed that are not built yet."""
    has_gpu = os.environ.get("DS_ACCELERATOR", "cpu") != "cpu"
    all_names = [*BUILDERS, *(GPU_BUILDERS if has_gpu else ())]
    wanted = [name for name in names or all_names if not (folder / name / f"{name}.so").is_file()]
    wrong = [*locks(folder), *missing_tools()] if wanted else []
    if not wrong and wanted:
        wrong = list(_built(wanted, folder))
    for sentence in wrong:
        click.echo(sentence, err=True)
    sys.exit(1 if wrong else 0)


def locks(folder: Path) -> list[str]:
    """Returns a sentence on each lock that a build would wait for."""
    return [
        f"{lock} is there, from {time.ctime(lock.stat().st_mtime)}: an operator is being built, or its build was "
        "interrupted. If none is under way, delete the file: torch would wait for it for ever."
        for lock in sorted(folder.glob("*/lock"))
    ]


def missing_tools() -> list[str]:
    """Returns a sentence on each tool that a build needs and that is not there."""
    found = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        found.append(f"There is no C++ compiler: {compiler} is not found. Install g++, or name another in CXX.")
    if shutil.which("ninja", path=_search_path()) is None:
        found.append("ninja is missing: pip install ninja.")
    return found


def _built(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Builds operators; yields a sentence on each that cannot be built."""
    os.environ["PATH"] = _search_path()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.resolve())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    for name in names:
        builder = get_accelerator().create_op_builder({**BUILDERS, **GPU_BUILDERS}[name])
        if not builder.is_compatible(verbose=False):
            yield _reason(name)
            continue
        click.echo(f"building {name}")
        try:
            builder.load(verbose=False)
        except Exception as error:  # noqa: BLE001 - the others can be built all the same
            yield f"{name} was not built: {error}"


def _reason(name: str) -> str:
    if name == "async_io":
        return "async_io, for NVMe, needs libaio with its header: install libaio-dev (Debian) or libaio-devel (Fedora)."
    return f"{name} cannot be built: DeepSpeed's builder says that it does not fit this machine."


def _search_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


if __name__ == "__main__":
    main()
