"""Choice of the sink for an item of the configuration."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.trackers.base import Sink
from hallo_numguard.trackers.tensorboard import TensorBoardSink

GROUP = "hallo_numguard.sinks"
"""Group of entry points; each is called with the text after the colon of "name:text", or with None."""

_BUILT_IN = {"csv": "csv_file:CsvSink", "mlflow": "mlflow:MlflowSink", "wandb": "wandb:WandbSink"}


def sink_for(item: Any) -> Sink:
    """Returns the sink of one item of `GuardConfig.sinks`. Starts no run.

    Args:
        item: A `Sink`, a SummaryWriter, or the name of a tracker.

    Raises:
        InvalidInput: If it is none of these.
    """
    if isinstance(item, str):
        return _named(item)
    if isinstance(item, Sink):
        return item
    if all(callable(getattr(item, name, None)) for name in ("add_scalar", "add_text")):
        return TensorBoardSink(item)
    raise InvalidInput(
        f"sinks: expected a Sink, a SummaryWriter or the name of a tracker, got {type(item).__name__}; "
        "a Sink has write(step, figures) and report(report)"
    )


def _named(item: str) -> Sink:
    name, _, argument = item.partition(":")
    factory = _factory(name)
    try:
        sink = factory(argument or None)
    except Exception as error:
        raise InvalidInput(f"sinks: {item!r} cannot be used: {error}") from error
    if not isinstance(sink, Sink):
        raise InvalidInput(f"sinks: {item!r} gave a {type(sink).__name__}, which has not write and report")
    return sink


def _factory(name: str) -> Any:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(f"hallo_numguard.trackers.{module}"), attribute)
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name in installed:
        return installed[name].load()
    if name == "tensorboard":
        raise InvalidInput("sinks: for TensorBoard give the SummaryWriter that the run has, in place of its name")
    known = ", ".join(sorted({*_BUILT_IN, *installed}))
    raise InvalidInput(f"sinks: no tracker is called {name!r}; known are {known}, and a SummaryWriter or a Sink itself")
