"""`hallo-numguard preflight`."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hallo_numguard.cli import _shared as shared
from hallo_numguard.core.errors import InvalidInput


@click.command(
    "preflight",
    epilog=shared.epilog(
        "preflight --model model/ --dtype float16",
        "preflight --checkpoint run/ --world-size 8 --config ds_config.json",
        "preflight --model model/ --build train:build_model",
    ),
)
@click.option("--model", "models", multiple=True, type=shared.PATH, help="Weights to start from; repeat for several.")
@click.option("--checkpoint", type=shared.PATH, help="Folder of the checkpoint to resume from.")
@click.option("--world-size", type=click.IntRange(min=1), help="Number of processes of the run.")
@click.option("--zero-stage", type=click.IntRange(0, 3), show_default="from the configuration", help="ZeRO stage.")
@shared.dtype_option
@click.option("--config", type=shared.PATH, help="DeepSpeed configuration (JSON).")
@shared.manifest_option
@click.option("--build", metavar="MODULE:FUNCTION", help="Function that returns the model, or (model, small batch).")
@click.option("--loss", metavar="MODULE:FUNCTION", help="Function that computes the loss from the model's output.")
@shared.threads_option
@shared.format_option
def command(
    models: tuple[Path, ...],
    checkpoint: Path | None,
    world_size: int | None,
    zero_stage: int | None,
    dtype: str | None,
    config: Path | None,
    listing: Path | None,
    build: str | None,
    loss: str | None,
    threads: int | None,
    style: str,
) -> int:
    """Check a run before its first step, without a GPU.

    Checks the files against their manifest, every value in them, the optimizer state, the loss scaler, and the number
    of processes, ZeRO stage and dtype against the checkpoint's. With --build also the names and shapes of the model
    against those of the files; if it returns a batch, also a forward and backward pass on the weights of --model.
    """
    from hallo_numguard.files.preflight.run import PreflightInputs, read_config, run
    from hallo_numguard.files.preflight.run_spec import RunSpec
    from hallo_numguard.integrations.preflight import loaded_model

    if not models and checkpoint is None and config is None:
        raise click.UsageError("there is nothing to check: give --model, --checkpoint or --config")
    with shared.progress_bar() as advance:
        spec = RunSpec(world_size, zero_stage, dtype, read_config(config))
        built, batch = (None, None) if build is None else _built(build, models)
        model = None if built is None else replace(loaded_model(built), is_loaded=batch is not None)
        loss_fn = None if loss is None else _function("--loss", loss)
        found = run(PreflightInputs(models, checkpoint, listing, spec, model, batch, loss_fn), threads, advance)
    return shared.print_findings(found, style)


def _built(build: str, models: tuple[Path, ...]) -> tuple[Any, Any]:
    """Returns the model that the user's function builds, and the batch if it returns one.

    With a batch the model is filled with the weights of the files.
    """
    from hallo_numguard.files.formats import open_source
    from hallo_numguard.files.preflight.loaded import fill
    from hallo_numguard.files.preflight.matching import collect
    from hallo_numguard.integrations.preflight import loaded_model

    function = _function("--build", build)
    try:
        result = function()
        model, batch = result if isinstance(result, tuple) else (result, None)
        if batch is not None and models:
            fill(model, collect(loaded_model(model), [open_source(path) for path in models], False).entries)
    except Exception as error:
        raise InvalidInput(f"--build {build} failed: {type(error).__name__}: {error}") from error
    return model, batch


def _function(option: str, where: str) -> Any:
    """Returns the function that an option names as MODULE:FUNCTION."""
    module, _, name = where.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise InvalidInput(f"{option} {where} failed: {type(error).__name__}: {error}") from error
