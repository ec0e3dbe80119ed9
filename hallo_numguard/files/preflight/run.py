"""All checks before the first step of a run, in the order in which problems can be solved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.findings import Finding, PreflightReport, by_severity, merge
from hallo_numguard.files.formats import Source
from hallo_numguard.files.keeper.store import META
from hallo_numguard.files.manifest.verify import verify_manifest
from hallo_numguard.files.preflight import keys, loaded, matching, optimizer_state, precision, smoke, topology
from hallo_numguard.files.preflight.loaded import LoadedModel
from hallo_numguard.files.preflight.run_spec import RunSpec
from hallo_numguard.files.scan.scan import Progress, as_dtype, folders, open_all, scan_opened

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class PreflightInputs:
    """The inputs of the checks.

    Attributes:
        models: Files or folders of the initial weights.
        checkpoint: Folder to resume from.
        manifest: Manifest of the files (default: the one beside them).
        spec: Facts about the start of the run.
        model: The model, if it is in memory.
        batch: Small batch for the smoke step; None for no smoke step.
        loss_fn: Function that computes the loss from the model's output.
        expected_loss: Loss of such a batch (default: the one saved beside the checkpoint).
    """

    models: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    manifest: Path | None = None
    spec: RunSpec = field(default_factory=RunSpec)
    model: LoadedModel | None = None
    batch: Any = None
    loss_fn: smoke.LossFunction | None = None
    expected_loss: float | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files and folders."""
        return self.models if self.checkpoint is None else (*self.models, self.checkpoint)


def run(inputs: PreflightInputs, threads: int | None = None, progress: Progress | None = None) -> PreflightReport:
    """Runs all checks that the inputs allow.

    (a) integrity, (b) values, (c) names and shapes, (d) optimizer state, (e) number of processes, ZeRO stage and dtype,
    (f) loss scaler, (g) launcher and precision, (h) smoke step.

    Reads every file twice, the second time from the page cache if it fits there.

    Args:
        inputs: The inputs.
        threads: Reader threads (default: number of CPUs).
        progress: Called with the number of bytes just read, and the total.
    """
    sources, unknown = open_all(inputs.paths)
    weights = [source for source in sources if source.root != inputs.checkpoint]
    checkpoint = next((source for source in sources if source.root == inputs.checkpoint), None)
    reports = [
        PreflightReport(unchecked=unknown),
        *(_integrity(path, inputs.manifest) for path in inputs.paths if path.exists()),
        scan_opened(sources, as_dtype(inputs.spec.precision), threads, progress),
    ]
    findings = _names(inputs.model, weights, checkpoint)
    if checkpoint is not None:
        for folder in folders(checkpoint):
            findings += [*optimizer_state.check(folder, inputs.spec), *topology.check(folder, inputs.spec)]
    findings += precision.check(inputs.spec, weights)
    reports += [PreflightReport(tuple(findings), _checked(inputs, checkpoint)), _smoke(inputs)]
    return _without_repetitions(merge(reports))


def as_paths(paths: Paths | None) -> tuple[Path, ...]:
    """Returns one path, several or none as a tuple."""
    if paths is None:
        return ()
    return (Path(paths),) if isinstance(paths, (str, os.PathLike)) else tuple(map(Path, paths))


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """Returns a DeepSpeed configuration, read from the file if a path is given.

    Raises:
        InvalidInput: If the file cannot be read, or holds no JSON object.
    """
    if config is None or isinstance(config, Mapping):
        return config or {}
    try:
        document = json.loads(Path(config).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the configuration {config} cannot be read: {error}") from error
    if not isinstance(document, Mapping):
        raise InvalidInput(f"the configuration {config} should hold a JSON object, got {type(document).__name__}")
    return document


def _integrity(path: Path, manifest: Path | None) -> PreflightReport:
    """Compares a folder with its manifest; a file with the manifest of its folder."""
    folder = path if path.is_dir() else path.parent
    report = verify_manifest(folder, manifest)
    if report.unchecked and not report.findings and manifest is None:
        return PreflightReport(checked=(f"No manifest says what the bytes of {path} should be",))
    if path.is_dir():
        return report
    about_file = tuple(finding for finding in report.findings if finding.file in (path.name, str(path)))
    return PreflightReport(about_file, report.checked, report.unchecked)


def _names(model: LoadedModel | None, weights: Sequence[Source], checkpoint: Source | None) -> list[Finding]:
    """Compares names, shapes and values of the model with those of the files; a checkpoint may not be loaded yet."""
    if model is None:
        return []
    findings = []
    for sources, is_loaded in ((weights, model.is_loaded), ([] if checkpoint is None else [checkpoint], False)):
        if not sources:
            continue
        found = matching.collect(model, sources, is_loaded)
        shapes = {name: entry.whole_shape for name, entry in found.entries.items()}
        part = replace(model, shapes=matching.adapter_shapes(model)) if found.is_adapter else model
        findings += keys.check(part, shapes, found.path)
        if is_loaded:
            findings += loaded.check(model, found.entries, found.path)
    return findings


def _checked(inputs: PreflightInputs, checkpoint: Source | None) -> tuple[str, ...]:
    checked = []
    if inputs.model is not None and inputs.paths:
        checked.append(f"Names and shapes of the model's {len(inputs.model.shapes)} tensors")
    if checkpoint is not None:
        has_state = any(entry.role not in ("parameter", "buffer") for entry in checkpoint.entries)
        what = (
            "Optimizer state, ranks, stage and loss scaler"
            if has_state
            else "Ranks and stage, without optimizer state,"
        )
        checked.append(f"{what} of {checkpoint.root} ({checkpoint.layout})")
    return tuple(checked)


def _smoke(inputs: PreflightInputs) -> PreflightReport:
    model = inputs.model
    if inputs.batch is None or model is None:
        return PreflightReport()
    expected = inputs.expected_loss if inputs.expected_loss is not None else _saved_loss(inputs.checkpoint)
    return smoke.check(model.module, lambda: smoke.call_with(model.forward, inputs.batch), inputs.loss_fn, expected)


def _saved_loss(checkpoint: Path | None) -> float | None:
    """The loss that `CheckpointKeeper` wrote beside a checkpoint."""
    try:
        loss = json.loads((checkpoint / META).read_text()).get("loss") if checkpoint is not None else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return loss if isinstance(loss, (int, float)) else None


def _without_repetitions(report: PreflightReport) -> PreflightReport:
    """The report with each finding once: two checks of a file find the same damage."""
    unique = {(finding.kind, finding.message): finding for finding in report.findings}
    checked, unchecked = dict.fromkeys(report.checked), dict.fromkeys(report.unchecked)
    not_read = tuple(dict.fromkeys(report.not_read))
    return PreflightReport(by_severity(list(unique.values())), tuple(checked), tuple(unchecked), not_read)
