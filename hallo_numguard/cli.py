"""The command line: `hallo-numguard`."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hallo_numguard import __version__
from hallo_numguard.core.errors import NumGuardError

if TYPE_CHECKING:
    from hallo_numguard.core.findings import PreflightReport
    from hallo_numguard.report.inputs import ReportInputs

_SHOWN = {"cuda": "native"}  # a module that is not called so


@click.group()
@click.version_option(__version__)
def main() -> None:
    """The numerics guard for PyTorch and DeepSpeed training."""


@main.command()
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def env(style: str) -> None:
    """Print versions, instruction set, threads, and which backend runs where and why."""
    facts = environment()
    if style == "json":
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "backends":
            table.add_row(name, str(value))
    for device, report in facts["backends"].items():
        table.add_row(f"backend for {device}", report["chosen"])
        for backend, reason in report["not_used"].items():
            table.add_row("", f"not {backend}: {reason}")
    Console().print(table)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page that works offline.")
@click.option("--perfetto", type=click.Path(path_type=Path), help="Also write a timeline for ui.perfetto.dev.")
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def report(files: tuple[Path, ...], html: Path | None, perfetto: Path | None, style: str) -> None:
    """Show overflow reports and traces. Needs no torch.

    FILES are reports that the guard has written into its dump_dir, one a rank, and traces that were saved.
    """
    from hallo_numguard.report import inputs as reading

    try:
        material = reading.read(files)
        if html is not None:
            _write_page(material, html)
        if perfetto is not None:
            _write_timeline(material, perfetto)
    except NumGuardError as error:
        raise _CannotCheck(str(error)) from error
    _print_report(material, style)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dtype", help="That the weights will be trained in, such as float16; else what the config says.")
@click.option("--threads", type=click.IntRange(min=1), help="That read; as many as there are CPUs if left out.")
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def scan(paths: tuple[Path, ...], dtype: str | None, threads: int | None, style: str) -> None:
    """Read every tensor of files or folders and report what is damaged.

    PATHS are weights (safetensors, torch.save) and folders of models and checkpoints. Exits with 0 if nothing was
    found, 1 if something was, 2 if not all could be checked. No code in the files runs.
    """
    from hallo_numguard.files.scan.scan import scan as scan_paths

    with _failures(), _progress() as advance:
        found = scan_paths(*paths, dtype=dtype, threads=threads, progress=advance)
    _print_findings(found, style)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--md5", is_flag=True, help="Also write MD5SUMS.")
@click.option("--sign", metavar="KEY", type=click.Path(path_type=Path), help="Also sign, with this private key (PEM).")
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def manifest(folder: Path, md5: bool, sign: Path | None, style: str) -> None:
    """Write down what the files of FOLDER are, for `verify`.

    SHA256SUMS for sha256sum -c, numguard.manifest.json as OpenSSF model signing has it, numguard.tensors.json with the
    digest and the statistics of every tensor.
    """
    from hallo_numguard.files.manifest import signing
    from hallo_numguard.files.manifest.write import write_manifest

    with _failures(), _progress() as advance:
        written = write_manifest(folder, md5=md5, progress=advance)
    if sign is not None and not written.unchecked:
        with _failures():
            signing.sign(folder, sign)
    _print_findings(written, style)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--manifest", "listing", type=click.Path(path_type=Path), help="Where it is, if not in FOLDER.")
@click.option("--key", type=click.Path(path_type=Path), help="Also check the signature, with this public key (PEM).")
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def verify(folder: Path, listing: Path | None, key: Path | None, style: str) -> None:
    """Compare FOLDER with its manifest: files that are missing, extra or changed, and which tensors differ.

    Reads what `manifest` wrote, or a list of checksums that sha256sum or md5sum wrote, or the digests that the Hugging
    Face Hub gave.
    """
    from hallo_numguard.core.findings import merge
    from hallo_numguard.files.manifest import signing
    from hallo_numguard.files.manifest.verify import verify_manifest

    with _failures(), _progress() as advance:
        reports = [verify_manifest(folder, listing, progress=advance)]
        if key is not None:
            reports.append(signing.check(folder, key))
    _print_findings(merge(reports), style)


@main.command()
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path), help="Weights to start from.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder that it resumes from.")
@click.option("--world-size", type=click.IntRange(min=1), help="Number of processes of the run.")
@click.option("--zero-stage", type=click.IntRange(0, 3), help="Of DeepSpeed's ZeRO; else what --config says.")
@click.option("--dtype", help="That weights are trained in, such as float16; else what --config says.")
@click.option("--config", type=click.Path(path_type=Path), help="DeepSpeed's configuration (JSON).")
@click.option("--manifest", "listing", type=click.Path(path_type=Path), help="Of the files, if it is not beside them.")
@click.option("--build", metavar="MODULE:FUNCTION", help="Returns the model, or a pair of it and a small batch.")
@click.option("--threads", type=click.IntRange(min=1), help="That read; as many as there are CPUs if left out.")
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def preflight(
    models: tuple[Path, ...],
    checkpoint: Path | None,
    world_size: int | None,
    zero_stage: int | None,
    dtype: str | None,
    config: Path | None,
    listing: Path | None,
    build: str | None,
    threads: int | None,
    style: str,
) -> None:
    """Check a run before its first step, and before any GPU is taken.

    The files against their manifest, every value in them, the optimizer's state, the number of processes, ZeRO stage
    and dtype against the checkpoint's, the loss scaler in it, the configuration. With --build also the names and shapes
    of the model against those of the files, and with a batch a forward and backward pass on the weights in --model.

    Exits with 0 if nothing was found, 1 if something was, 2 if not all could be checked.
    """
    from hallo_numguard.files.preflight.run import Inputs, read_config, run
    from hallo_numguard.files.preflight.run_spec import Plan
    from hallo_numguard.integrations.preflight import subject_of

    if not models and checkpoint is None and config is None:
        raise _CannotCheck("there is nothing to check: give --model, --checkpoint or --config")
    with _failures(), _progress() as advance:
        plan = Plan(world_size, zero_stage, dtype, read_config(config))
        built, batch = _built(build, models)
        subject = None if built is None else subject_of(built)
        found = run(Inputs(models, checkpoint, listing, plan, subject, batch), threads, advance)
    _print_findings(found, style)


def _built(build: str | None, models: tuple[Path, ...]) -> tuple[Any, Any]:
    """The model that the user's function returns, with the weights of the files, and the batch if it returns one."""
    if build is None:
        return None, None
    from hallo_numguard.files.preflight.loaded import fill

    place, _, name = build.partition(":")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(place), name)()
        model, batch = made if isinstance(made, tuple) else (made, None)
        if batch is not None:
            fill(model, models)
    except Exception as error:
        raise _CannotCheck(f"--build {build} failed: {type(error).__name__}: {error}") from error
    return model, batch


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def diff(a: Path, b: Path, style: str) -> None:
    """Compare two models or checkpoints, A and B, tensor by tensor."""
    from hallo_numguard.files import diff as comparing

    with _failures():
        found = comparing.diff(a, b)
    _print_findings(found, style)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal, that goes on by bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, advance=done, total=total)


@contextmanager
def _failures() -> Iterator[None]:
    """Turns what cannot be done into a message and exit code 2."""
    try:
        yield
    except NumGuardError as error:
        raise _CannotCheck(str(error)) from error
    except OSError as error:
        raise _CannotCheck(f"{error.filename} cannot be read or written: {error.strerror}") from error


def _print_findings(found: PreflightReport, style: str) -> NoReturn:
    """Prints a report, and ends with its exit code."""
    if style == "json":
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        from rich.console import Console

        from hallo_numguard.report import findings_table as findings

        Console(highlight=False).print(findings.render(found))
    sys.exit(found.exit_code)


class _CannotCheck(click.ClickException):
    """Something could not be read, or could not be written."""

    exit_code = 2

    def format_message(self) -> str:
        from hallo_numguard.core.safe_text import harmless

        return harmless(self.message)


def _write_page(material: ReportInputs, path: Path) -> None:
    from hallo_numguard.report.html import render as html

    _write(path, html.render(material))


def _write_timeline(material: ReportInputs, path: Path) -> None:
    from hallo_numguard.report import perfetto

    _write(path, perfetto.render(material))


def _write(path: Path, text: str) -> None:
    from hallo_numguard.core.atomic_files import write_whole

    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise _CannotCheck(f"{path} cannot be written: {error.strerror}") from error


def _print_report(material: ReportInputs, style: str) -> None:
    if style == "json":
        from hallo_numguard.report import merged_json

        click.echo(merged_json.render(material))
        return
    from rich.console import Console

    from hallo_numguard.report import terminal

    Console(highlight=False).print(terminal.render(material))


def environment() -> dict[str, Any]:
    """Returns what `hallo-numguard env` prints."""
    import torch

    from hallo_numguard.ops.backends import cpu as native
    from hallo_numguard.ops.backends import cuda
    from hallo_numguard.ops.native_extension import extension

    isas = native.isas()
    has_gpu = torch.cuda.is_available()
    return {
        "hallo-numguard": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "deepspeed": _installed("deepspeed"),
        "triton": _installed("triton"),
        "native extension": "built" if extension() is not None else "not built",
        "instruction set": isas[native.isa()] if isas else "none",
        "instruction sets of this CPU": ", ".join(isas) or "none",
        "threads": torch.get_num_threads(),
        "CUDA extension": "built" if cuda.extension() is not None else "not built",
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "backends": {device: _backends(device) for device in (("cpu", "cuda") if has_gpu else ("cpu",))},
    }


def _backends(device: str) -> dict[str, Any]:
    from hallo_numguard.core.errors import BackendUnavailable
    from hallo_numguard.ops import dispatch

    try:
        module = dispatch.backend_for(device).__name__.rpartition(".")[2]  # type: ignore[attr-defined]
        chosen = _SHOWN.get(module, module)
    except BackendUnavailable as error:
        chosen = f"none: {error}"
    reasons = dispatch.explain(device)
    not_used = {
        name: why or "a faster one runs, or another is forced" for name, why in reasons.items() if name != chosen
    }
    return {"chosen": chosen, "not_used": not_used}


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
