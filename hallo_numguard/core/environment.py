"""Versions and host of a report's process, loaded libraries that hide NaN, and the switch that disables guards.

Imports none of the libraries.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata

_log = logging.getLogger("hallo_numguard")

DISABLE_VARIABLE = "HALLO_NUMGUARD_DISABLE"

Environment = Mapping[str, str | int | tuple[str, ...] | None]
"""Facts by name, as `collect` returns them."""

_DISTRIBUTIONS = ("hallo-numguard", "torch", "deepspeed", "triton", "accelerate", "transformers", "lightning", "wandb")
_HIDES_NAN = {
    "transformers.trainer": (
        "transformers.Trainer writes the mean of earlier losses into its log where a loss is NaN or infinite, unless "
        "TrainingArguments(logging_nan_inf_filter=False): a loss that looks fine there proves nothing."
    ),
    "wandb": (
        "wandb.watch leaves NaN and infinite values out of its histograms, and a tensor without a finite value out "
        "altogether: a histogram that looks fine there proves nothing."
    ),
}


def collect(rank: int | None = None) -> Environment:
    """Returns facts about this process, without importing anything.

    Args:
        rank: Global rank of this process.

    Returns:
        Versions by distribution (None where it is not installed), "python", "cuda", "platform", "hostname", "rank",
        and "hides_nan": sentences on loaded modules that keep NaN out of their logs unless configured otherwise.
        A guard adds "run" (see `run_description.new_run_id`), "time", "name", "command", "world_size", "framework",
        "zero_stage", "device", and "guard_failures": tracebacks of its own failures.
    """
    torch = sys.modules.get("torch")
    return {
        **versions(),
        **({} if torch is None else {"torch": str(torch.__version__)}),  # with the build, as +cu130
        "cuda": getattr(getattr(torch, "version", None), "cuda", None),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "rank": rank,
        "hides_nan": tuple(sentence for module, sentence in _HIDES_NAN.items() if module in sys.modules),
    }


def guards_are_disabled() -> bool:
    """Returns whether HALLO_NUMGUARD_DISABLE says so: is set, and not to a word for no. Logs that once a process."""
    if os.environ.get(DISABLE_VARIABLE, "").strip().lower() in ("", "0", "false", "no", "off"):
        return False
    _log_disabled()
    return True


@functools.cache
def _log_disabled() -> None:
    _log.warning("hallo_numguard is off, because %s is set: no run of this process is guarded", DISABLE_VARIABLE)


def rows(environment: Environment) -> list[tuple[str, str]]:
    """Returns names and values for a display, without unknown ones and long texts."""
    return [
        (name, str(value))
        for name, value in environment.items()
        if name not in ("hides_nan", "guard_failures") and value is not None
    ]


def hides_nan(environment: Environment) -> tuple[str, ...]:
    """Returns the sentences on loaded libraries that keep NaN out of their logs."""
    sentences = environment.get("hides_nan")
    return sentences if isinstance(sentences, tuple) else ()


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Returns the versions of Python and of distributions, None for those that are not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
