"""The public names, each once: what `hallo_numguard` offers, and where it is."""

from . import integrations as integrations
from .core.config import GuardConfig as GuardConfig
from .core.config import Policy as Policy
from .core.errors import BackendUnavailable as BackendUnavailable
from .core.errors import CheckpointFailed as CheckpointFailed
from .core.errors import InvalidInput as InvalidInput
from .core.errors import NoActiveRun as NoActiveRun
from .core.errors import NumericsError as NumericsError
from .core.errors import NumGuardError as NumGuardError
from .core.errors import UnsupportedDeepSpeed as UnsupportedDeepSpeed
from .core.findings import Finding as Finding
from .core.findings import PreflightReport as PreflightReport
from .core.frames import load_trace as load_trace
from .core.overflow_report import OverflowReport as OverflowReport
from .core.records import Offender as Offender
from .core.records import Record as Record
from .core.records import StepRecord as StepRecord
from .core.records import Verdict as Verdict
from .files.diff import diff as diff
from .files.keeper.checkpoint_keeper import CheckpointKeeper as CheckpointKeeper
from .files.manifest.verify import verify_manifest as verify_manifest
from .files.manifest.write import write_manifest as write_manifest
from .files.scan.scan import scan as scan
from .integrations import attach as attach
from .integrations.injection import inject as inject
from .integrations.preflight import preflight as preflight
from .integrations.torch_optim import GuardedOptimizer as GuardedOptimizer
from .ops.api import multi_tensor_stats as multi_tensor_stats
from .ops.api import tensor_stats as tensor_stats
from .ops.layout import Layout as Layout
from .ops.table import StatsTable as StatsTable
from .tracing.tracer import trace as trace
from .trackers.base import Sink as Sink

__version__: str
