"""Everything that can be checked before the first step, in the order in which it can be mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport, by_severity, merge
from hallo_numguard.files.formats import Source
from hallo_numguard.files.keeper.store import META
from hallo_numguard.files.manifest.verify import verify_manifest
from hallo_numguard.files.preflight import keys, loaded, precision, smoke, topology
from hallo_numguard.files.preflight import loss_scaler as scaler
from hallo_numguard.files.preflight import optimizer_state as optimizer
from hallo_numguard.files.preflight.run_spec import Plan
from hallo_numguard.files.scan.scan import Progress, as_dtype, open_all, scan_opened

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Subject:
    """A model that is in memory already.

    Attributes:
        module: It.
        shapes: Of its state dict; of weights that lie elsewhere (ZeRO-3) the whole shape.
        state: Its tensors by name, those that are here.
        aliases: Other names of tensors that have several, with their first.
        unsaved: Names of buffers that are not in its state dict.
        forward: Calls it as training does.
    """

    module: nn.Module
    shapes: keys.Shapes
    state: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]
    unsaved: frozenset[str]
    forward: Callable[..., Any]


@dataclass(frozen=True)
class Inputs:
    """What is to be checked.

    Attributes:
        models: Files of weights, or folders with such, that the run starts from.
        checkpoint: Folder that it resumes from.
        manifest: Of these, if it is not beside them.
        plan: How the run is to be made.
        subject: The model, if it is there.
        batch: A small one, for the smoke step; None for no such step.
        loss_fn: Makes the loss of what the model returns.
        expected_loss: Of such a batch; what is written beside the checkpoint if left out.
    """

    models: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    manifest: Path | None = None
    plan: Plan = field(default_factory=Plan)
    subject: Subject | None = None
    batch: Any = None
    loss_fn: smoke.LossFunction | None = None
    expected_loss: float | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that is on disk."""
        return self.models if self.checkpoint is None else (*self.models, self.checkpoint)


def run(inputs: Inputs, threads: int | None = None, progress: Progress | None = None) -> PreflightReport:
    """Checks all that was given.

    (a) integrity, (b) values, (c) names and shapes, (d) optimizer state, (e) number of processes, stage and dtype, (f)
    loss scaler, (g) launcher and precision, (h) a smoke step.

    Args:
        inputs: What there is.
        threads: That read.
        progress: Called with the number of bytes just read and of all bytes.

    Cost: two reads of every file, of which the second comes from the page cache if it fits there.
    """
    sources, unknown = open_all(inputs.paths)
    held = [source for source in sources if source.root != inputs.checkpoint]
    resumed = next((source for source in sources if source.root == inputs.checkpoint), None)
    reports = [
        PreflightReport(unchecked=unknown),
        *(_integrity(path, inputs.manifest) for path in inputs.paths if path.exists()),
    ]
    reports.append(scan_opened(sources, as_dtype(inputs.plan.precision), threads, progress))
    findings = _names(inputs.subject, held, resumed)
    if resumed is not None:
        findings += [*optimizer.check(resumed, inputs.plan), *topology.check(resumed, inputs.plan)]
        findings += [*scaler.check(resumed), *_not_asked(resumed, inputs.plan)]
    findings += precision.check(inputs.plan, held)
    reports += [PreflightReport(tuple(findings), _looked_at(inputs, resumed)), _smoke(inputs)]
    return _without_repetitions(merge(reports))


def as_paths(paths: Paths | None) -> tuple[Path, ...]:
    """Returns one path, or several, as a tuple."""
    if paths is None:
        return ()
    return (Path(paths),) if isinstance(paths, (str, os.PathLike)) else tuple(map(Path, paths))


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """Returns a DeepSpeed configuration, of a file if it is none itself.

    Raises:
        InvalidInput: If the file cannot be read, or is none.
    """
    if config is None or isinstance(config, Mapping):
        return config or {}
    try:
        read = json.loads(Path(config).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the configuration {config} cannot be read: {error}") from error
    if not isinstance(read, Mapping):
        raise InvalidInput(f"the configuration {config} holds no object, but {type(read).__name__}")
    return read


def _integrity(path: Path, manifest: Path | None) -> PreflightReport:
    """Of a folder; of a file, what the manifest of its folder says of it."""
    folder = path if path.is_dir() else path.parent
    report = verify_manifest(folder, manifest)
    if report.unchecked and not report.findings and manifest is None:
        return PreflightReport(checked=(f"No manifest says what the bytes of {path} should be",))
    if path.is_dir():
        return report
    about = tuple(finding for finding in report.findings if finding.file in (path.name, str(path)))
    return PreflightReport(about, report.checked, report.unchecked)


def _names(subject: Subject | None, held: Sequence[Source], resumed: Source | None) -> list[Finding]:
    """Names, shapes and values of the model against those of the files."""
    if subject is None:
        return []
    findings = []
    for source in [*held, *([] if resumed is None else [resumed])]:
        findings += keys.compare(subject.shapes, subject.aliases, subject.unsaved, source)
    for source in held:
        findings += loaded.check(subject.state, source)
    return findings


def _not_asked(source: Source, plan: Plan) -> list[Finding]:
    size = topology.data_parallel_size(source)
    if plan.world_size is not None or size is None or source.metadata.get("zero_stage") == 0:
        return []
    message = f"{source.root.name} was written by {size} data-parallel ranks; the number of processes was not given"
    return [Finding("world_size", message, severity="info", file=str(source.root))]


def _looked_at(inputs: Inputs, resumed: Source | None) -> tuple[str, ...]:
    looked = []
    if inputs.subject is not None and inputs.paths:
        looked.append(f"Names and shapes of the model's {len(inputs.subject.shapes)} tensors")
    if resumed is not None:
        looked.append(f"Optimizer state, ranks, stage and loss scaler of {resumed.root} ({resumed.layout})")
    return tuple(looked)


def _smoke(inputs: Inputs) -> PreflightReport:
    subject = inputs.subject
    if inputs.batch is None or subject is None:
        return PreflightReport()
    expected = inputs.expected_loss if inputs.expected_loss is not None else _saved_loss(inputs.checkpoint)
    return smoke.check(subject.module, lambda: smoke.call_with(subject.forward, inputs.batch), inputs.loss_fn, expected)


def _saved_loss(checkpoint: Path | None) -> float | None:
    """What `CheckpointKeeper` has written beside a checkpoint."""
    try:
        loss = json.loads((checkpoint / META).read_text()).get("loss") if checkpoint is not None else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return loss if isinstance(loss, (int, float)) else None


def _without_repetitions(report: PreflightReport) -> PreflightReport:
    """Two looks at the same file find the same damage."""
    unique = {(finding.kind, finding.message): finding for finding in report.findings}
    checked, unchecked = dict.fromkeys(report.checked), dict.fromkeys(report.unchecked)
    return PreflightReport(by_severity(list(unique.values())), tuple(checked), tuple(unchecked))
