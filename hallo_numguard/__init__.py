"""The numerics guard for PyTorch and DeepSpeed training.

Importing this package imports neither torch nor deepspeed nor triton: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallo_numguard import integrations
    from hallo_numguard.checkpoint.diff import diff
    from hallo_numguard.checkpoint.keeper import CheckpointKeeper
    from hallo_numguard.checkpoint.manifest import write_manifest
    from hallo_numguard.checkpoint.report import PreflightReport
    from hallo_numguard.checkpoint.scan import scan
    from hallo_numguard.checkpoint.verify import verify_manifest
    from hallo_numguard.config import GuardConfig, Policy
    from hallo_numguard.errors import (
        BackendUnavailable,
        CheckpointFailed,
        InvalidInput,
        NoActiveRun,
        NumericsError,
        NumGuardError,
        UnsupportedDeepSpeed,
    )
    from hallo_numguard.injection import inject
    from hallo_numguard.integrations import attach
    from hallo_numguard.integrations.optimizer import GuardedOptimizer
    from hallo_numguard.integrations.preflight import preflight
    from hallo_numguard.ops.layout import Layout
    from hallo_numguard.ops.stats import multi_tensor_stats, tensor_stats
    from hallo_numguard.ops.table import StatsTable
    from hallo_numguard.records import (
        Finding,
        Offender,
        OverflowReport,
        Record,
        StepRecord,
        Verdict,
    )
    from hallo_numguard.sinks.base import Sink
    from hallo_numguard.tracing.frames import load as load_trace
    from hallo_numguard.tracing.tracer import trace

_HOMES = {
    "BackendUnavailable": "errors",
    "CheckpointFailed": "errors",
    "CheckpointKeeper": "checkpoint.keeper",
    "Finding": "records",
    "GuardConfig": "config",
    "GuardedOptimizer": "integrations.optimizer",
    "InvalidInput": "errors",
    "Layout": "ops.layout",
    "NoActiveRun": "errors",
    "NumGuardError": "errors",
    "NumericsError": "errors",
    "Offender": "records",
    "OverflowReport": "records",
    "Policy": "config",
    "PreflightReport": "checkpoint.report",
    "Record": "records",
    "Sink": "sinks.base",
    "StatsTable": "ops.table",
    "StepRecord": "records",
    "UnsupportedDeepSpeed": "errors",
    "Verdict": "records",
    "attach": "integrations",
    "diff": "checkpoint.diff:diff",
    "inject": "injection",
    "load_trace": "tracing.frames:load",
    "multi_tensor_stats": "ops.stats",
    "preflight": "integrations.preflight",
    "scan": "checkpoint.scan:scan",
    "tensor_stats": "ops.stats",
    "trace": "tracing.tracer",
    "verify_manifest": "checkpoint.verify",
    "write_manifest": "checkpoint.manifest",
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
