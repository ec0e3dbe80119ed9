"""The numerics guard for PyTorch and DeepSpeed training.

Importing this package imports neither torch nor deepspeed nor triton: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallo_numguard import integrations
    from hallo_numguard.core.config import GuardConfig, Policy
    from hallo_numguard.core.errors import (
        BackendUnavailable,
        CheckpointFailed,
        InvalidInput,
        NoActiveRun,
        NumericsError,
        NumGuardError,
        UnsupportedDeepSpeed,
    )
    from hallo_numguard.core.findings import Finding, PreflightReport
    from hallo_numguard.core.frames import load as load_trace
    from hallo_numguard.core.overflow_report import OverflowReport
    from hallo_numguard.core.records import Offender, Record, StepRecord, Verdict
    from hallo_numguard.files.diff import diff
    from hallo_numguard.files.keeper.checkpoint_keeper import CheckpointKeeper
    from hallo_numguard.files.manifest.verify import verify_manifest
    from hallo_numguard.files.manifest.write import write_manifest
    from hallo_numguard.files.scan.scan import scan
    from hallo_numguard.integrations import attach
    from hallo_numguard.integrations.injection import inject
    from hallo_numguard.integrations.preflight import preflight
    from hallo_numguard.integrations.torch_optim import GuardedOptimizer
    from hallo_numguard.ops.api import multi_tensor_stats, tensor_stats
    from hallo_numguard.ops.layout import Layout
    from hallo_numguard.ops.table import StatsTable
    from hallo_numguard.tracing.tracer import trace
    from hallo_numguard.trackers.base import Sink

_HOMES = {
    "BackendUnavailable": "core.errors",
    "CheckpointFailed": "core.errors",
    "CheckpointKeeper": "files.keeper.checkpoint_keeper",
    "Finding": "core.findings",
    "GuardConfig": "core.config",
    "GuardedOptimizer": "integrations.torch_optim",
    "InvalidInput": "core.errors",
    "Layout": "ops.layout",
    "NoActiveRun": "core.errors",
    "NumGuardError": "core.errors",
    "NumericsError": "core.errors",
    "Offender": "core.records",
    "OverflowReport": "core.overflow_report",
    "Policy": "core.config",
    "PreflightReport": "core.findings",
    "Record": "core.records",
    "Sink": "trackers.base",
    "StatsTable": "ops.table",
    "StepRecord": "core.records",
    "UnsupportedDeepSpeed": "core.errors",
    "Verdict": "core.records",
    "attach": "integrations",
    "diff": "files.diff:diff",
    "inject": "integrations.injection",
    "load_trace": "core.frames:load",
    "multi_tensor_stats": "ops.api",
    "preflight": "integrations.preflight",
    "scan": "files.scan.scan:scan",
    "tensor_stats": "ops.api",
    "trace": "tracing.tracer",
    "verify_manifest": "files.manifest.verify",
    "write_manifest": "files.manifest.write",
}

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "CheckpointFailed",
    "CheckpointKeeper",
    "Finding",
    "GuardConfig",
    "GuardedOptimizer",
    "InvalidInput",
    "Layout",
    "NoActiveRun",
    "NumGuardError",
    "NumericsError",
    "Offender",
    "OverflowReport",
    "Policy",
    "PreflightReport",
    "Record",
    "Sink",
    "StatsTable",
    "StepRecord",
    "UnsupportedDeepSpeed",
    "Verdict",
    "attach",
    "diff",
    "inject",
    "integrations",
    "load_trace",
    "multi_tensor_stats",
    "preflight",
    "scan",
    "tensor_stats",
    "trace",
    "verify_manifest",
    "write_manifest",
]


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return importlib.import_module(f"{__name__}.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, original = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
