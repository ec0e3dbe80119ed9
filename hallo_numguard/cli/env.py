"""`hallo-numguard env`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from hallo_numguard import __version__
from hallo_numguard.cli import _shared as shared
from hallo_numguard.core import environment
from hallo_numguard.core.errors import BackendUnavailable

_EXIT_CODES = {0: "the facts were printed"}


@click.command("env", epilog=shared.epilog("env", "env --format json", exit_codes=_EXIT_CODES))
@shared.format_option
def command(style: str) -> int:
    """Print versions, instruction set and backends, for bug reports.

    Names the backend that runs on each device, and why the others do not.
    """
    facts = _facts()
    if style == "json":
        click.echo(json.dumps(facts, indent=2))
        return 0
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
    return 0


def _facts() -> dict[str, Any]:
    import torch

    from hallo_numguard.ops.backends import cpu
    from hallo_numguard.ops.native_extension import why_cuda_missing, why_missing

    isas = cpu.isas()
    has_gpu = torch.cuda.is_available()
    return {
        **{name: version or "not installed" for name, version in environment.versions().items()},
        "hallo-numguard": __version__,
        "platform": environment.collect()["platform"],
        "native extension": why_missing() or "built",
        "instruction set": isas[cpu.isa()] if isas else "none",
        "instruction sets of this CPU": ", ".join(isas) or "none",
        "threads": torch.get_num_threads(),
        "CUDA extension": why_cuda_missing() or "built",
        "locks of torch's extensions": _locks(),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "backends": {device: _backends(device) for device in (("cpu", "cuda") if has_gpu else ("cpu",))},
    }


def _locks() -> str:
    """Returns which operators whoever loads them would wait for, those of DeepSpeed among them."""
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    found = [
        f"{path}, of {time.ctime(path.stat().st_mtime)}"
        for path in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    ]
    if not found:
        return "none"
    return f"{'; '.join(found)}: if nothing is being compiled, delete it, or every run that needs it waits for ever"


def _backends(device: str) -> dict[str, Any]:
    from hallo_numguard.ops import dispatch

    try:
        running = dispatch.backend_for(device)
        chosen = next(name for name in dispatch.BACKENDS if dispatch.backend(name, device) is running)
    except BackendUnavailable as error:
        chosen = f"none: {error}"
    reasons = dispatch.explain(device)
    not_used = {
        name: reason or "a faster one runs, or another is forced" for name, reason in reasons.items() if name != chosen
    }
    return {"chosen": chosen, "not_used": not_used}
